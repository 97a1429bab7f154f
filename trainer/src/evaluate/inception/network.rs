//! Inception v3 as a list of parts, from which both its parameters and its computing follow (Szegedy et al., arXiv
//! 1512.00567). It is the network of TensorFlow's release of 2015-12-05, by which Fréchet Inception distances are
//! defined (Heusel et al., arXiv 1706.08500): its average pools do not count the border, and its last block takes a
//! maximum where the paper has an average. Names are those of PyTorch's ports (`pytorch-fid`, `torch-fidelity`).

use crate::params::{Init, Layout};

/// Channels of the last block: the pooled features.
pub(super) const WIDTH: usize = 2048;

/// Outputs of the classifier, of which 1,000 are ImageNet's classes.
pub(super) const CLASSES: usize = 1008;

/// A convolution without bias, batch normalisation and ReLU.
#[derive(Debug, Clone, Copy)]
pub(super) struct Convolution {
    pub name: &'static str,
    pub outputs: usize,
    /// Rows and columns.
    pub kernel: [usize; 2],
    pub stride: usize,
    /// Whether a border of zeros keeps the size, at stride 1.
    pub border: bool,
}

/// One step of a branch.
#[derive(Debug, Clone, Copy)]
pub(super) enum Part {
    Convolve(Convolution),
    /// Two convolutions of the same input, one's channels after the other's.
    Both(Convolution, Convolution),
    /// The mean of 3 x 3 pixels, of fewer at the border; the size stays.
    Average,
    /// The largest of 3 x 3 pixels, at stride 2 without a border, at stride 1 with one.
    Largest {
        stride: usize,
    },
}

/// Branches of the same input, whose channels follow one another. A block without a name has one branch, whose
/// convolutions have the whole of their name.
#[derive(Debug)]
pub(super) struct Block {
    pub name: &'static str,
    pub branches: Vec<Vec<Part>>,
}

impl Convolution {
    /// Rows and columns of zeros on each side.
    pub fn padding(&self) -> [usize; 2] {
        self.kernel.map(|side| if self.border { side / 2 } else { 0 })
    }
}

impl Block {
    /// The name of one of its convolutions among the parameters.
    pub fn full_name(&self, convolution: &Convolution) -> String {
        match self.name {
            "" => convolution.name.to_owned(),
            block => format!("{block}.{}", convolution.name),
        }
    }
}

/// With a border where it has more than one pixel.
fn conv(name: &'static str, outputs: usize, kernel: [usize; 2]) -> Part {
    Part::Convolve(same(name, outputs, kernel))
}

fn same(name: &'static str, outputs: usize, kernel: [usize; 2]) -> Convolution {
    Convolution { name, outputs, kernel, stride: 1, border: true }
}

/// 3 x 3 without a border.
fn bare(name: &'static str, outputs: usize, stride: usize) -> Part {
    Part::Convolve(Convolution { name, outputs, kernel: [3, 3], stride, border: false })
}

const POINT: [usize; 2] = [1, 1];
const THREE: [usize; 2] = [3, 3];
const FIVE: [usize; 2] = [5, 5];
const ROW: [usize; 2] = [1, 7];
const COLUMN: [usize; 2] = [7, 1];
const HALVED: Part = Part::Largest { stride: 2 };

/// 299 x 299 pixels to 35 x 35 positions of 192 channels.
fn stem() -> Block {
    let branch = vec![
        bare("Conv2d_1a_3x3", 32, 2),
        bare("Conv2d_2a_3x3", 32, 1),
        conv("Conv2d_2b_3x3", 64, THREE),
        HALVED,
        conv("Conv2d_3b_1x1", 80, POINT),
        bare("Conv2d_4a_3x3", 192, 1),
        HALVED,
    ];
    Block { name: "", branches: vec![branch] }
}

/// At 35 x 35 positions.
fn block_a(name: &'static str, pooled: usize) -> Block {
    let branches = vec![
        vec![conv("branch1x1", 64, POINT)],
        vec![conv("branch5x5_1", 48, POINT), conv("branch5x5_2", 64, FIVE)],
        vec![
            conv("branch3x3dbl_1", 64, POINT),
            conv("branch3x3dbl_2", 96, THREE),
            conv("branch3x3dbl_3", 96, THREE),
        ],
        vec![Part::Average, conv("branch_pool", pooled, POINT)],
    ];
    Block { name, branches }
}

/// From 35 x 35 positions to 17 x 17.
fn block_b() -> Block {
    let branches = vec![
        vec![bare("branch3x3", 384, 2)],
        vec![
            conv("branch3x3dbl_1", 64, POINT),
            conv("branch3x3dbl_2", 96, THREE),
            bare("branch3x3dbl_3", 96, 2),
        ],
        vec![HALVED],
    ];
    Block { name: "Mixed_6a", branches }
}

/// At 17 x 17 positions.
fn block_c(name: &'static str, narrow: usize) -> Block {
    let branches = vec![
        vec![conv("branch1x1", 192, POINT)],
        vec![
            conv("branch7x7_1", narrow, POINT),
            conv("branch7x7_2", narrow, ROW),
            conv("branch7x7_3", 192, COLUMN),
        ],
        vec![
            conv("branch7x7dbl_1", narrow, POINT),
            conv("branch7x7dbl_2", narrow, COLUMN),
            conv("branch7x7dbl_3", narrow, ROW),
            conv("branch7x7dbl_4", narrow, COLUMN),
            conv("branch7x7dbl_5", 192, ROW),
        ],
        vec![Part::Average, conv("branch_pool", 192, POINT)],
    ];
    Block { name, branches }
}

/// From 17 x 17 positions to 8 x 8.
fn block_d() -> Block {
    let branches = vec![
        vec![conv("branch3x3_1", 192, POINT), bare("branch3x3_2", 320, 2)],
        vec![
            conv("branch7x7x3_1", 192, POINT),
            conv("branch7x7x3_2", 192, ROW),
            conv("branch7x7x3_3", 192, COLUMN),
            bare("branch7x7x3_4", 192, 2),
        ],
        vec![HALVED],
    ];
    Block { name: "Mixed_7a", branches }
}

/// At 8 x 8 positions.
fn block_e(name: &'static str, pool: Part) -> Block {
    let both = |first, second| Part::Both(same(first, 384, [1, 3]), same(second, 384, [3, 1]));
    let branches = vec![
        vec![conv("branch1x1", 320, POINT)],
        vec![conv("branch3x3_1", 384, POINT), both("branch3x3_2a", "branch3x3_2b")],
        vec![
            conv("branch3x3dbl_1", 448, POINT),
            conv("branch3x3dbl_2", 384, THREE),
            both("branch3x3dbl_3a", "branch3x3dbl_3b"),
        ],
        vec![pool, conv("branch_pool", 192, POINT)],
    ];
    Block { name, branches }
}

/// All blocks, in order.
pub(super) fn blocks() -> Vec<Block> {
    vec![
        stem(),
        block_a("Mixed_5b", 32),
        block_a("Mixed_5c", 64),
        block_a("Mixed_5d", 64),
        block_b(),
        block_c("Mixed_6b", 128),
        block_c("Mixed_6c", 160),
        block_c("Mixed_6d", 160),
        block_c("Mixed_6e", 192),
        block_d(),
        block_e("Mixed_7b", Part::Average),
        block_e("Mixed_7c", Part::Largest { stride: 1 }),
    ]
}

/// The parameters that features take, under the ports' names; the classifier's bias, which ADM's evaluator leaves out,
/// is not among them.
pub(super) fn layout() -> Layout {
    let mut layout = Layout::default();
    let mut inputs = 3;
    for block in blocks() {
        let outputs = block.branches.iter().map(|branch| {
            branch.iter().fold(inputs, |inputs, part| {
                let convolutions: &[&Convolution] = match part {
                    Part::Convolve(one) => &[one],
                    Part::Both(one, other) => &[one, other],
                    Part::Average | Part::Largest { .. } => return inputs,
                };
                for convolution in convolutions {
                    add(&mut layout, &block.full_name(convolution), inputs, convolution);
                }
                convolutions.iter().map(|convolution| convolution.outputs).sum()
            })
        });
        inputs = outputs.sum();
    }
    layout.linear("fc", WIDTH, CLASSES, Init::Zeros, None);
    layout
}

fn add(layout: &mut Layout, name: &str, inputs: usize, convolution: &Convolution) {
    let (outputs, [height, width]) = (convolution.outputs, convolution.kernel);
    layout.add(format!("{name}.conv.weight"), &[outputs, inputs, height, width], Init::Zeros);
    for part in ["weight", "bias", "running_mean", "running_var"] {
        layout.add(format!("{name}.bn.{part}"), &[outputs], Init::Zeros);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_add_up() {
        let layout = layout();
        let shape = |name: &str| layout.find(name).expect(name).shape.clone();
        assert_eq!(shape("Mixed_5c.branch1x1.conv.weight"), [64, 256, 1, 1]);
        assert_eq!(shape("Mixed_6b.branch7x7_2.conv.weight"), [128, 128, 1, 7]);
        assert_eq!(shape("Mixed_7b.branch3x3dbl_1.conv.weight"), [448, 1280, 1, 1]);
        assert_eq!(shape("Mixed_7c.branch_pool.conv.weight"), [192, WIDTH, 1, 1]);
        // torch-fidelity's model has 23,850,960 parameters beside running means and variances, 1,008 of them the
        // classifier's bias.
        let statistics: usize =
            layout.entries().iter().filter(|e| e.name.contains("running")).map(|e| e.len()).sum();
        assert_eq!(layout.total_len() - statistics, 23_850_960 - CLASSES);
    }
}
