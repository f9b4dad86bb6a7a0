#pragma once
#include "forward.hpp"
#include "backward.hpp"
