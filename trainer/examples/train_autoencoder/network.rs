//! The TAESD family's encoder and decoder for one image, forwards and backwards, on a flat array of
//! parameters in the order of `TaesdConfig::layout`. The finished weights are measured with the
//! library's own model, which would show any difference.

use repa_trainer::autoencoder::taesd::TaesdConfig;
use repa_trainer::params::Layout;

use crate::conv::{Packed, Padded, Planes, weight_gradient};

/// A convolution: its number, and its place in the flat array.
struct Conv {
    number: usize,
    inputs: usize,
    outputs: usize,
    weight: usize,
    bias: Option<usize>,
}

enum Member {
    Conv(Conv),
    /// A convolution with stride 2.
    Halve(Conv),
    Block([Conv; 3]),
    Clamp,
    Relu,
    Double,
}

/// The network without its weights.
pub struct Network {
    encoder: Vec<Member>,
    decoder: Vec<Member>,
}

/// The weights of one step, arranged for the convolutions, by their numbers.
pub struct Weights<'a> {
    flat: &'a [f32],
    forward: Vec<Packed>,
    backward: Vec<Packed>,
}

/// What the way back needs of one member.
enum Saved {
    Input(Padded),
    Block([Padded; 3], Planes),
    Output(Planes),
    Nothing,
}

/// What the way back needs of one half.
pub struct Tape(Vec<Saved>);

impl Network {
    pub fn new(config: &TaesdConfig, layout: &Layout) -> Self {
        assert!(!config.mid_group_norm, "this program trains the family's plain form");
        let mut number = 0;
        let mut conv = |name: String| {
            let weight = layout.find(&format!("{name}.weight")).expect("a convolution of the layout");
            let bias = layout.find(&format!("{name}.bias")).map(|b| b.offset);
            number += 1;
            let (outputs, inputs) = (weight.shape[0], weight.shape[1]);
            Conv { number: number - 1, inputs, outputs, weight: weight.offset, bias }
        };
        let stages = config.widths.len();
        let mut encoder = vec![Member::Conv(conv("encoder.0".into()))];
        for (stage, &blocks) in config.encoder_blocks.iter().enumerate() {
            if stage > 0 {
                encoder.push(Member::Halve(conv(format!("encoder.{}", encoder.len()))));
            }
            for _ in 0..blocks {
                let at = encoder.len();
                encoder.push(Member::Block([0, 2, 4].map(|n| conv(format!("encoder.{at}.conv.{n}")))));
            }
        }
        encoder.push(Member::Conv(conv(format!("encoder.{}", encoder.len()))));
        let mut decoder = vec![Member::Clamp, Member::Conv(conv("decoder.1".into())), Member::Relu];
        for (stage, &blocks) in config.decoder_blocks.iter().enumerate().rev() {
            if stage + 1 < stages {
                decoder.push(Member::Double);
                decoder.push(Member::Conv(conv(format!("decoder.{}", decoder.len()))));
            }
            for _ in 0..blocks {
                let at = decoder.len();
                decoder.push(Member::Block([0, 2, 4].map(|n| conv(format!("decoder.{at}.conv.{n}")))));
            }
        }
        decoder.push(Member::Conv(conv(format!("decoder.{}", decoder.len()))));
        Self { encoder, decoder }
    }

    /// Arranges the weights of a step.
    pub fn weights<'a>(&self, flat: &'a [f32]) -> Weights<'a> {
        let mut weights = Weights { flat, forward: vec![], backward: vec![] };
        for conv in self.encoder.iter().chain(&self.decoder).flat_map(Member::convs) {
            let values = &flat[conv.weight_range()];
            weights.forward.push(Packed::forward(values, conv.inputs, conv.outputs));
            weights.backward.push(Packed::backward(values, conv.inputs, conv.outputs));
        }
        weights
    }

    /// Image [3, side, side] in [0, 1] to latent.
    pub fn encode(&self, weights: &Weights, image: Planes) -> (Planes, Tape) {
        forward(&self.encoder, weights, image)
    }

    /// Latent to image.
    pub fn decode(&self, weights: &Weights, latent: Planes) -> (Planes, Tape) {
        forward(&self.decoder, weights, latent)
    }

    /// Adds the encoder's gradients to `out`.
    pub fn encode_backward(&self, weights: &Weights, tape: Tape, gradient: Planes, out: &mut [f32]) {
        backward(&self.encoder, weights, tape, gradient, out);
    }

    /// Adds the decoder's gradients to `out`. Returns that of the latent.
    pub fn decode_backward(
        &self,
        weights: &Weights,
        tape: Tape,
        gradient: Planes,
        out: &mut [f32],
    ) -> Planes {
        backward(&self.decoder, weights, tape, gradient, out)
    }
}

impl Weights<'_> {
    /// Number of parameters.
    pub fn len(&self) -> usize {
        self.flat.len()
    }
}

impl Conv {
    fn weight_range(&self) -> std::ops::Range<usize> {
        self.weight..self.weight + self.inputs * self.outputs * 9
    }

    fn forward(&self, weights: &Weights, x: &Padded) -> Planes {
        let bias = self.bias.map(|at| &weights.flat[at..at + self.outputs]);
        weights.forward[self.number].apply(x, bias)
    }

    /// Adds the gradients of weights and bias to `out`. Returns that of the input.
    fn backward(&self, weights: &Weights, x: &Padded, gradient: &Planes, out: &mut [f32]) -> Planes {
        weight_gradient(x, gradient, &mut out[self.weight_range()]);
        if let Some(at) = self.bias {
            let planes = gradient.data.chunks_exact(gradient.side * gradient.side);
            for (sum, plane) in out[at..at + self.outputs].iter_mut().zip(planes) {
                *sum += plane.iter().sum::<f32>();
            }
        }
        weights.backward[self.number].apply(&gradient.padded(), None)
    }
}

impl Member {
    fn convs(&self) -> &[Conv] {
        match self {
            Member::Conv(conv) | Member::Halve(conv) => std::slice::from_ref(conv),
            Member::Block(convs) => convs,
            Member::Clamp | Member::Relu | Member::Double => &[],
        }
    }
}

fn forward(members: &[Member], weights: &Weights, mut x: Planes) -> (Planes, Tape) {
    let mut tape = vec![];
    for member in members {
        let saved;
        (x, saved) = match member {
            Member::Conv(conv) => {
                let input = x.padded();
                (conv.forward(weights, &input), Saved::Input(input))
            }
            Member::Halve(conv) => {
                let input = x.padded();
                (conv.forward(weights, &input).subsampled(), Saved::Input(input))
            }
            Member::Block([first, second, third]) => {
                let input = x.padded();
                let a = first.forward(weights, &input).relu().padded();
                let b = second.forward(weights, &a).relu().padded();
                let y = third.forward(weights, &b).add(&input).relu();
                (y.clone(), Saved::Block([input, a, b], y))
            }
            Member::Clamp => {
                x.data.iter_mut().for_each(|v| *v = 3.0 * libm::tanhf(*v / 3.0));
                (x.clone(), Saved::Output(x))
            }
            Member::Relu => {
                let y = x.relu();
                (y.clone(), Saved::Output(y))
            }
            Member::Double => (x.doubled(), Saved::Nothing),
        };
        tape.push(saved);
    }
    (x, Tape(tape))
}

fn backward(members: &[Member], weights: &Weights, tape: Tape, gradient: Planes, out: &mut [f32]) -> Planes {
    members.iter().zip(tape.0).rev().fold(gradient, |mut gradient, step| match step {
        (Member::Conv(conv), Saved::Input(input)) => conv.backward(weights, &input, &gradient, out),
        (Member::Halve(conv), Saved::Input(input)) => conv.backward(weights, &input, &gradient.spread(), out),
        (Member::Block([first, second, third]), Saved::Block([input, a, b], y)) => {
            mask(&mut gradient, &y);
            let of_b = third.backward(weights, &b, &gradient, out).masked(&b);
            let of_a = second.backward(weights, &a, &of_b, out).masked(&a);
            let mut of_input = first.backward(weights, &input, &of_a, out);
            of_input.data.iter_mut().zip(&gradient.data).for_each(|(v, g)| *v += g);
            of_input
        }
        (Member::Clamp, Saved::Output(y)) => {
            gradient.data.iter_mut().zip(&y.data).for_each(|(g, y)| *g *= 1.0 - (y / 3.0) * (y / 3.0));
            gradient
        }
        (Member::Relu, Saved::Output(y)) => {
            mask(&mut gradient, &y);
            gradient
        }
        (Member::Double, Saved::Nothing) => gradient.summed(),
        _ => unreachable!("the tape was written by these members"),
    })
}

/// Sets a gradient to zero where a ReLU gave zero.
fn mask(gradient: &mut Planes, relu: &Planes) {
    for (g, y) in gradient.data.iter_mut().zip(&relu.data) {
        if *y <= 0.0 {
            *g = 0.0;
        }
    }
}
