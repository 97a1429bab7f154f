//! In which float type the matrix products run.

use burn::tensor::FloatDType;
use serde::{Deserialize, Serialize};

/// The type of weights and activations in matrix products and attention. Master weights, the
/// residual stream, normalisations, softmax, embeddings of time and label, and losses are float32
/// whatever is chosen here (as they are under PyTorch's autocast, with which the reference trains).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// float32.
    #[default]
    F32,
    /// bfloat16: float32's range, 8 bits of precision. Needs no loss scaling.
    Bf16,
    /// float16: 11 bits of precision, largest value 65504. Needs loss scaling.
    F16,
}

impl Precision {
    /// burn's name of the type.
    pub fn dtype(self) -> FloatDType {
        match self {
            Self::F32 => FloatDType::F32,
            Self::Bf16 => FloatDType::BF16,
            Self::F16 => FloatDType::F16,
        }
    }

    /// Whether gradients can underflow, so that training needs
    /// [`LossScaler`](crate::objective::LossScaler).
    pub fn needs_loss_scaling(self) -> bool {
        self == Self::F16
    }
}
