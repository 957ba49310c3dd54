#include "skip_plan/kernel.h"

namespace saltire::skip_plan {

Select avx512_select() {
  return select_row;
}

}  // namespace saltire::skip_plan
