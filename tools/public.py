"""What of fastseq is public: what its reference documents, and what the tests of the reference hold it to."""

from __future__ import annotations

# What users do not import; everything else below fastseq is public, as far as its names have no underscore in front.
INTERNAL = {
    "__main__",
    "backends",
    "benchmarks",
    "choice",
    "info",
    "kernels",
    "modules",
    "ops",
    "parity",
    "reference",
    "support_matrix",
    "transformers_masks",
    "tuning",
}
OWN_PAGES = {"functional", "integrations", "models"}  # packages with a page of their own under docs/api
