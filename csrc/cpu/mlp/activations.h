// The activations on vectors, for one instruction-set level.
#pragma once

#include "../isa/vec.h"  // the bounds of vectors must be declared before the functions that call them
#include "../../common/activation_math.h"
