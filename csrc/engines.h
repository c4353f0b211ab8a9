// The engines of this build.
#pragma once

#include "engine.h"

namespace gradl1 {

const Engine& host_engine();
const Engine& cuda_engine();

}  // namespace gradl1
