//! The families of frozen encoders that REPA compares, and in what their vision transformers differ.

use std::fmt;
use std::path::{Path, PathBuf};

use super::preprocess::Preprocess;

/// LayerNorm's epsilon in CLIP's models; the others have [`EPSILON`].
const CLIP_EPSILON: f64 = 1e-5;
/// LayerNorm's epsilon in all models but CLIP's.
const EPSILON: f64 = 1e-6;
/// Heads are 64 wide in most published models.
const HEAD_DIM: usize = 64;

/// A family of vision transformers trained alike. All are read as the reference's `load_encoders` and
/// `preprocess_raw_image` use them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Family {
    /// DINOv2 (Oquab et al., arXiv 2304.07193), with registers or without.
    DinoV2,
    /// DINO (Caron et al., arXiv 2104.14294).
    DinoV1,
    /// MoCo v3 (Chen et al., arXiv 2104.02057).
    MoCoV3,
    /// Masked autoencoders (He et al., arXiv 2111.06377). Patch tokens are taken before the final norm.
    Mae,
    /// I-JEPA (Assran et al., arXiv 2301.08243). It has no class token.
    IJepa,
    /// CLIP's image encoder as OpenAI trained it (Radford et al., arXiv 2103.00020). Patch tokens are taken
    /// before the final norm.
    Clip,
}

impl Family {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::DinoV2, Self::DinoV1, Self::MoCoV3, Self::Mae, Self::IJepa, Self::Clip];

    /// Its name in configurations, which is the reference's (`--enc-type`).
    pub fn name(self) -> &'static str {
        match self {
            Self::DinoV2 => "dinov2",
            Self::DinoV1 => "dinov1",
            Self::MoCoV3 => "mocov3",
            Self::Mae => "mae",
            Self::IJepa => "jepa",
            Self::Clip => "clip",
        }
    }

    /// The family called so.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|family| family.name() == name)
    }

    /// Divides `mae:weights/mae.pth` into the family and the file. A path without a family's name before a
    /// colon is a path, and its family has to follow from the weights.
    pub fn of_path(name: &Path) -> (Option<Self>, PathBuf) {
        name.to_str()
            .and_then(|text| text.split_once(':'))
            .and_then(|(family, path)| Some((Some(Self::named(family)?), PathBuf::from(path))))
            .unwrap_or_else(|| (None, name.to_owned()))
    }

    /// What is done to an image before a model of the family sees it. The reference shows CLIP 224 pixels
    /// whatever the image's size; that is 7/8 of 256 here as for the others.
    pub fn preprocess(self) -> Preprocess {
        let (mean, std) = match self {
            Self::Clip => {
                ([0.481_454_66, 0.457_827_5, 0.408_210_73], [0.268_629_54, 0.261_302_6, 0.275_777_1])
            }
            _ => (Preprocess::DINOV2.mean, Preprocess::DINOV2.std),
        };
        let resize = match self {
            Self::DinoV2 | Self::IJepa | Self::Clip => Preprocess::DINOV2.resize,
            Self::DinoV1 | Self::MoCoV3 | Self::Mae => None,
        };
        Preprocess { mean, std, resize }
    }

    /// Attention heads of the published model of a width.
    pub(super) fn heads(self, width: usize) -> usize {
        match (self, width) {
            (Self::MoCoV3, 384) => 12,
            // The huge and the giant models of MAE and I-JEPA.
            (Self::Mae | Self::IJepa, 1280 | 1408) => 16,
            _ => width / HEAD_DIM,
        }
    }

    /// Whether a class token stands before the patches.
    pub(super) fn class_token(self) -> bool {
        self != Self::IJepa
    }

    /// Whether the blocks' outputs are scaled channel by channel (LayerScale).
    pub(super) fn layer_scale(self) -> bool {
        self == Self::DinoV2
    }

    /// Whether tokens are normalised before the first block.
    pub(super) fn first_norm(self) -> bool {
        self == Self::Clip
    }

    /// Whether the patches' projection has a bias.
    pub(super) fn patch_bias(self) -> bool {
        self != Self::Clip
    }

    /// Whether features are taken after the final norm.
    pub(super) fn final_norm(self) -> bool {
        !matches!(self, Self::Mae | Self::Clip)
    }

    /// LayerNorm's epsilon.
    pub(super) fn epsilon(self) -> f64 {
        if self == Self::Clip { CLIP_EPSILON } else { EPSILON }
    }

    /// Whether GELU is approximated by x sigmoid(1.702 x).
    pub(super) fn quick_gelu(self) -> bool {
        self == Self::Clip
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_stands_before_the_path() {
        let split = |text: &str| {
            let (family, path) = Family::of_path(Path::new(text));
            (family, path.to_str().unwrap().to_owned())
        };
        for family in Family::ALL {
            assert_eq!(split(&format!("{family}:a/b.pth")), (Some(family), "a/b.pth".to_owned()));
        }
        for path in ["a/b.pth", "a:b.pth", "MAE:b.pth", "mae", "weights/mae:b.pth"] {
            assert_eq!(split(path), (None, path.to_owned()));
        }
        assert_eq!(split("clip:a:b"), (Some(Family::Clip), "a:b".to_owned()));
    }
}
