//! Times forward and backward of a stack of SiT-like blocks, fused against composite operations.
//!
//! `cargo run --release -p repa-trainer --example step_bench [composite|fused] [small|medium] [steps]`;
//! with UNTUNED set, on the allocator as it comes.

use std::time::Instant;

use burn::tensor::{Device, Tensor, TensorData};
use repa_trainer::ops;

struct Geometry {
    hidden: usize,
    heads: usize,
    tokens: usize,
    batch: usize,
    depth: usize,
}

struct Block {
    condition: (Tensor<2>, Tensor<1>),
    qkv: (Tensor<2>, Tensor<1>),
    out: (Tensor<2>, Tensor<1>),
    up: (Tensor<2>, Tensor<1>),
    down: (Tensor<2>, Tensor<1>),
}

fn weights<const D: usize>(shape: [usize; D], seed: usize, device: &Device) -> Tensor<D> {
    let len: usize = shape.iter().product();
    let value = |i: usize| ((i * 7919 + seed * 104_729) % 1009) as f32 / 1009.0 - 0.5;
    let scale = 1.0 / (shape[D - 1] as f32).sqrt();
    let values = (0..len).map(|i| value(i) * scale).collect();
    Tensor::from_data(TensorData::new(values, shape), device)
}

impl Block {
    fn new(h: usize, seed: usize, device: &Device) -> Self {
        let pair = |outputs: usize, inputs: usize, n: usize| {
            let weight = weights([outputs, inputs], seed * 10 + n, device).require_grad();
            (weight, weights([outputs], seed * 10 + n + 5, device).require_grad())
        };
        Self {
            condition: pair(6 * h, h, 0),
            qkv: pair(3 * h, h, 1),
            out: pair(h, h, 2),
            up: pair(4 * h, h, 3),
            down: pair(h, 4 * h, 4),
        }
    }

    fn fused(&self, x: Tensor<3>, c: Tensor<3>, heads: usize) -> Tensor<3> {
        let linear =
            |x: Tensor<3>, p: &(Tensor<2>, Tensor<1>)| ops::linear(x, p.0.clone(), Some(p.1.clone()));
        let h = x.dims()[2];
        let c = linear(ops::silu(c), &self.condition);
        let part = |i: usize| c.clone().narrow(2, i * h, h);
        let y = ops::attention_qkv(
            linear(ops::modulate(x.clone(), part(0), part(1), 1e-6, x.dtype()), &self.qkv),
            heads,
        );
        let x = ops::gated_add(x, linear(y, &self.out), part(2));
        let y = ops::gelu_tanh(linear(ops::modulate(x.clone(), part(3), part(4), 1e-6, x.dtype()), &self.up));
        ops::gated_add(x, linear(y, &self.down), part(5))
    }

    fn composite(&self, x: Tensor<3>, c: Tensor<3>, heads: usize) -> Tensor<3> {
        use ops::composite;
        let linear =
            |x: Tensor<3>, p: &(Tensor<2>, Tensor<1>)| composite::linear(x, p.0.clone(), Some(p.1.clone()));
        let h = x.dims()[2];
        let c = linear(composite::silu(c), &self.condition);
        let part = |i: usize| c.clone().narrow(2, i * h, h);
        let y = composite::modulate(x.clone(), part(0), part(1), 1e-6);
        let y = composite::attention_qkv(linear(y, &self.qkv), heads);
        let x = composite::gated_add(x, linear(y, &self.out), part(2));
        let y = composite::modulate(x.clone(), part(3), part(4), 1e-6);
        let y = composite::gelu_tanh(linear(y, &self.up));
        composite::gated_add(x, linear(y, &self.down), part(5))
    }
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    if std::env::var_os("UNTUNED").is_none() {
        ops::allocator::tune_allocator();
    }
    let fused = arguments.next().is_none_or(|a| a == "fused");
    let small = arguments.next().is_none_or(|a| a == "small");
    let steps = arguments.next().map_or(10, |a| a.parse().expect("a number of steps"));
    let Geometry { hidden, heads, tokens, batch, depth } = if small {
        Geometry { hidden: 128, heads: 4, tokens: 64, batch: 32, depth: 6 }
    } else {
        Geometry { hidden: 384, heads: 6, tokens: 256, batch: 8, depth: 12 }
    };
    let device = Device::flex().autodiff();
    let blocks: Vec<_> = (0..depth).map(|i| Block::new(hidden, i, &device)).collect();
    let x = weights([batch, tokens, hidden], 1, &device);
    let c = weights([batch, 1, hidden], 2, &device);
    let mut times: Vec<[f64; 2]> = (0..steps + 2)
        .map(|_| {
            let start = Instant::now();
            let y = blocks.iter().fold(x.clone(), |x, block| {
                if fused { block.fused(x, c.clone(), heads) } else { block.composite(x, c.clone(), heads) }
            });
            let loss = (y.clone() * y).mean();
            let middle = Instant::now();
            let grads = loss.backward();
            for block in &blocks {
                for (weight, bias) in [&block.condition, &block.qkv, &block.out, &block.up, &block.down] {
                    let weight = weight.grad(&grads).expect("a leaf").into_data();
                    std::hint::black_box((weight, bias.grad(&grads)));
                }
            }
            [(middle - start).as_secs_f64() * 1e3, middle.elapsed().as_secs_f64() * 1e3]
        })
        .skip(2)
        .collect();
    times.sort_by(|a, b| (a[0] + a[1]).total_cmp(&(b[0] + b[1])));
    let [forward, backward] = times[times.len() / 2];
    println!(
        "{} {}: forward {forward:.1} ms, backward {backward:.1} ms, step {:.1} ms (best {:.1}), {} threads",
        if fused { "fused" } else { "composite" },
        if small { "small" } else { "medium" },
        forward + backward,
        times[0][0] + times[0][1],
        rayon::current_num_threads(),
    );
}
