//! The network in whose features samples are compared with data.

mod network;
mod resize;

use std::collections::HashMap;
use std::path::Path;

use burn::tensor::activation::{relu, softmax};
use burn::tensor::module::{avg_pool2d, conv2d, max_pool2d};
use burn::tensor::ops::{AvgPoolOptions, ConvOptions, MaxPoolOptions};
use burn::tensor::{Device, Tensor, TensorData};
use rayon::prelude::*;

use crate::images::Image;
use crate::params::Layout;
use crate::weights::{Weights, WeightsError};
use network::{Block, CLASSES, Convolution, Part, WIDTH};

/// Pixels a side of its input.
const SIDE: usize = 299;

/// Of batch normalisation, in TensorFlow's release.
const EPSILON: f32 = 1e-3;

/// The block of whose first branch sFID takes channels (Nash et al., arXiv 2103.03841), `mixed_6/conv` in TensorFlow's
/// graph, and how many.
const SPATIAL: &str = "Mixed_6d";
const SPATIAL_CHANNELS: usize = 7;
const SPATIAL_SIDE: usize = 17;

/// Images that go through at once: the largest array of twice as many is beyond what Vulkan allows by default.
pub(crate) const BATCH: usize = 16;

/// Features of images, float32.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct InceptionFeatures {
    /// The last block's channels, averaged over positions: [N, 2048], flattened.
    pub pooled: Vec<f32>,
    /// Seven channels at 17 x 17 positions, [N, 2023], flattened; channels run fastest, as in TensorFlow.
    pub spatial: Vec<f32>,
}

/// Inception v3 with the weights of a file.
#[derive(Debug, Clone)]
pub struct Inception {
    /// Weights and biases by the name of the convolution, batch normalisation in them.
    convolutions: HashMap<String, (Tensor<4>, Tensor<1>)>,
    /// [classes, features].
    classifier: Tensor<2>,
    device: Device,
}

impl Inception {
    /// Pooled features of an image.
    pub const POOLED: usize = WIDTH;
    /// Spatial features of an image.
    pub const SPATIAL: usize = SPATIAL_CHANNELS * SPATIAL_SIDE * SPATIAL_SIDE;
    /// Classes of [`Inception::probabilities`].
    pub const CLASSES: usize = CLASSES;

    /// The parameters that a file has to hold, under the ports' names.
    pub fn layout() -> Layout {
        network::layout()
    }

    /// Opens the weights as PyTorch's ports of TensorFlow's release have them:
    /// `pt_inception-2015-12-05-6726825d.pth` of `pytorch-fid`, or `weights-inception-2015-12-05-6726825d.pth` of
    /// `torch-fidelity`.
    ///
    /// # Errors
    /// The file cannot be read, or holds another network, such as torchvision's, whose features are others.
    pub fn open(path: &Path, device: &Device) -> Result<Self, WeightsError> {
        Self::from_weights(Weights::open(path)?, device)
    }

    /// From tensors in memory, under the ports' names.
    ///
    /// # Errors
    /// They are another network's.
    pub fn from_weights(mut weights: Weights, device: &Device) -> Result<Self, WeightsError> {
        // Counters of training, the classifier for training, and a bias that nothing here adds.
        weights.tensors.retain(|name, _| {
            !name.ends_with(".num_batches_tracked") && !name.starts_with("AuxLogits.") && name != "fc.bias"
        });
        let layout = Self::layout();
        weights.check(&layout).map_err(|error| match error {
            WeightsError::Mismatch { path, problem } => WeightsError::Mismatch {
                path,
                problem: format!(
                    "{problem}; Fréchet Inception distances are defined by TensorFlow's release of Inception v3 \
                     (pt_inception-2015-12-05-6726825d.pth)"
                ),
            },
            other => other,
        })?;
        let mut convolutions = HashMap::new();
        for entry in layout.entries() {
            let Some(name) = entry.name.strip_suffix(".conv.weight") else { continue };
            let (weight, bias) = folded(&weights, name)?;
            let shape = <[usize; 4]>::try_from(entry.shape.clone()).expect("a kernel has four dimensions");
            let weight = Tensor::from_data(TensorData::new(weight, shape), device);
            let bias = Tensor::from_data(TensorData::new(bias, [shape[0]]), device);
            convolutions.insert(name.to_owned(), (weight, bias));
        }
        let classifier = TensorData::new(weights.f32("fc.weight")?, [CLASSES, WIDTH]);
        let classifier = Tensor::from_data(classifier, device);
        Ok(Self { convolutions, classifier, device: device.clone() })
    }

    /// Features of images of any sizes, in their order. They are scaled to 299 x 299 pixels as TensorFlow 1 did it.
    pub fn features(&self, images: &[Image]) -> InceptionFeatures {
        let mut features = InceptionFeatures::default();
        for images in images.chunks(BATCH) {
            let planes: Vec<Vec<f32>> = images.par_iter().map(|image| resize::planes(image, SIDE)).collect();
            let data = TensorData::new(planes.concat(), [images.len(), 3, SIDE, SIDE]);
            let (pooled, spatial) = self.forward(Tensor::from_data(data, &self.device));
            features.pooled.extend(values(pooled));
            features.spatial.extend(values(spatial));
        }
        features
    }

    /// From [N, 3, 299, 299] in [-1, 1] to pooled features [N, 2048] and spatial ones [N, 2023].
    fn forward(&self, images: Tensor<4>) -> (Tensor<2>, Tensor<2>) {
        let mut x = images;
        let mut spatial = None;
        for block in network::blocks() {
            let branches: Vec<Tensor<4>> =
                block.branches.iter().map(|branch| self.branch(&block, branch, x.clone())).collect();
            if block.name == SPATIAL {
                spatial = Some(branches[0].clone().narrow(1, 0, SPATIAL_CHANNELS));
            }
            x = Tensor::cat(branches, 1);
        }
        let [n, ..] = x.dims();
        let spatial = spatial.expect("the network has this block").permute([0, 2, 3, 1]);
        (x.mean_dims(&[2, 3]).reshape([n, WIDTH]), spatial.reshape([n, Self::SPATIAL]))
    }

    fn branch(&self, block: &Block, parts: &[Part], x: Tensor<4>) -> Tensor<4> {
        parts.iter().fold(x, |x, part| match part {
            Part::Convolve(convolution) => self.convolve(block, convolution, x),
            Part::Both(one, other) => {
                Tensor::cat(vec![self.convolve(block, one, x.clone()), self.convolve(block, other, x)], 1)
            }
            Part::Average => {
                let options = AvgPoolOptions::new([3, 3]).with_stride([1, 1]).with_padding([1, 1]);
                avg_pool2d(x, options.with_count_include_pad(false))
            }
            &Part::Largest { stride } => {
                let border = usize::from(stride == 1);
                let options = MaxPoolOptions::new([3, 3]).with_stride([stride; 2]).with_padding([border; 2]);
                max_pool2d(x, options)
            }
        })
    }

    fn convolve(&self, block: &Block, convolution: &Convolution, x: Tensor<4>) -> Tensor<4> {
        let (weight, bias) = self.convolutions[&block.full_name(convolution)].clone();
        let (stride, padding) = (convolution.stride, convolution.padding());
        relu(match (convolution.kernel, padding) {
            ([1, 1], _) => pointwise(x, weight, bias),
            (_, [1, 1]) => crate::ops::conv2d(x, weight, Some(bias), stride, 1),
            _ => conv2d(x, weight, Some(bias), ConvOptions::new([stride; 2], padding, [1, 1], 1)),
        })
    }

    /// Probabilities of the classes by pooled features [N, 2048], flattened: [N, 1008]. Without the classifier's bias,
    /// as ADM's evaluator computes inception scores.
    pub fn probabilities(&self, pooled: &[f32]) -> Vec<f32> {
        let rows = TensorData::new(pooled.to_vec(), [pooled.len() / WIDTH, WIDTH]);
        let rows = Tensor::<2>::from_data(rows, &self.device);
        values(softmax(rows.matmul(self.classifier.clone().transpose()), 1))
    }

    /// Where it runs.
    pub fn device(&self) -> &Device {
        &self.device
    }
}

/// A convolution of single pixels: a matrix product, which needs no patches.
fn pointwise(x: Tensor<4>, weight: Tensor<4>, bias: Tensor<1>) -> Tensor<4> {
    let ([n, inputs, height, width], outputs) = (x.dims(), bias.dims()[0]);
    let x = x.reshape([n, inputs, height * width]);
    let y = weight.reshape([1, outputs, inputs]).matmul(x) + bias.reshape([1, outputs, 1]);
    y.reshape([n, outputs, height, width])
}

/// A convolution's weights and biases with the batch normalisation that follows it.
fn folded(weights: &Weights, name: &str) -> Result<(Vec<f32>, Vec<f32>), WeightsError> {
    let mut weight = weights.f32(&format!("{name}.conv.weight"))?;
    let part = |part: &str| weights.f32(&format!("{name}.bn.{part}"));
    let (gain, shift, mean, variance) =
        (part("weight")?, part("bias")?, part("running_mean")?, part("running_var")?);
    let each = weight.len() / gain.len();
    let mut bias = Vec::with_capacity(gain.len());
    for (channel, weight) in weight.chunks_exact_mut(each).enumerate() {
        let scale = gain[channel] / (variance[channel] + EPSILON).sqrt();
        weight.iter_mut().for_each(|w| *w *= scale);
        bias.push(shift[channel] - mean[channel] * scale);
    }
    Ok((weight, bias))
}

fn values(tensor: Tensor<2>) -> Vec<f32> {
    tensor.into_data().convert::<f32>().try_to_vec::<f32>().expect("converted to f32 just before")
}
