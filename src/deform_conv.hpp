#pragma once
#include "backward.hpp"
#include "forward.hpp"
#include "logistic.hpp"
