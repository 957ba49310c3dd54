#include "skip_plan/kernel.h"

namespace saltire::skip_plan {

Select ref_select() {
  return select_row;
}

}  // namespace saltire::skip_plan
