#include "skip_plan/kernel.h"

namespace saltire::skip_plan {

Select avx2_select() {
  return select_row;
}

}  // namespace saltire::skip_plan
