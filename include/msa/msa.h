// Everything: #include <msa/msa.h>.
#pragma once

#include "msa/backend.h"
#include "msa/ops.h"
#include "msa/problem.h"
#include "msa/status.h"
#include "msa/tensor.h"
#include "msa/version.h"
