// Everything: #include <msa/msa.h>.
#pragma once

#define MSA_VERSION_MAJOR 0
#define MSA_VERSION_MINOR 1
#define MSA_VERSION_PATCH 0
#define MSA_VERSION_STRING "0.1.0"

#include "msa/backend.h"
#include "msa/ops.h"
#include "msa/problem.h"
#include "msa/status.h"
#include "msa/tensor.h"
