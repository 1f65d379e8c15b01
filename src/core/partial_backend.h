// A backend that has some of the operators: it overrides those, and names them in supports().
#pragma once

#include "msa/backend.h"

namespace msa {

class PartialBackend : public Backend {
 public:
  Status run(const Plan& p, const IndexScoresParams&, Workspace, Queue) const override {
    return supports(p.problem);
  }
  Status run(const Plan& p, const SelectBlocksParams&, Workspace, Queue) const override {
    return supports(p.problem);
  }
  Status run(const Plan& p, const IndexSelectParams&, Workspace, Queue) const override {
    return supports(p.problem);
  }
  Status run(const Plan& p, const SparseAttentionParams&, Workspace, Queue) const override {
    return supports(p.problem);
  }
  Status run(const Plan& p, const DenseAttentionParams&, Workspace, Queue) const override {
    return supports(p.problem);
  }
  Status run(const Plan& p, const MergeParams&, Workspace, Queue) const override {
    return supports(p.problem);
  }
  Status run(const Plan& p, const BlockListsParams&, Workspace, Queue) const override {
    return supports(p.problem);
  }
  Status run(const Plan& p, const AppendPagedParams&, Workspace, Queue) const override {
    return supports(p.problem);
  }
  Status run(const Plan& p, const BlockMassParams&, Workspace, Queue) const override {
    return supports(p.problem);
  }
  Status run(const Plan& p, const AttentionBackwardParams&, Workspace, Queue) const override {
    return supports(p.problem);
  }
  Status run(const Plan& p, const IndexLseParams&, Workspace, Queue) const override {
    return supports(p.problem);
  }
  Status run(const Plan& p, const KlParams&, Workspace, Queue) const override {
    return supports(p.problem);
  }
};

}  // namespace msa
