//! How much arithmetic an image takes.

use super::SitConfig;

/// Features of the timestep's embedding before its MLP.
const TIMESTEP_FREQUENCIES: u64 = 256;

impl SitConfig {
    /// Floating-point operations of training on one image: those of the matrix products, two for each multiplication
    /// and addition, of the forward pass and twice as many of the backward pass. What a fused operation computes anew
    /// does not count, so the figure over time is model FLOP/s (Chowdhery et al., arXiv 2204.02311, appendix B).
    #[must_use]
    pub fn training_flops(&self) -> u64 {
        3 * self.forward_flops()
    }

    fn forward_flops(&self) -> u64 {
        let [tokens, hidden, mlp] = [self.tokens(), self.hidden_size, self.mlp_hidden()].map(|n| n as u64);
        let patch = (self.patch_size * self.patch_size * self.in_channels) as u64;
        let product = |rows: u64, inputs: u64, outputs: u64| 2 * rows * inputs * outputs;
        let attention = product(tokens, hidden, 3 * hidden)
            + 2 * product(tokens, hidden, tokens)
            + product(tokens, hidden, hidden);
        let block = attention + 2 * product(tokens, hidden, mlp) + product(1, hidden, 6 * hidden);
        let ends = product(tokens, patch, hidden)
            + product(1, TIMESTEP_FREQUENCIES, hidden)
            + product(1, hidden, hidden)
            + product(1, hidden, 2 * hidden)
            + product(tokens, hidden, patch);
        let middle = self.projector_dim as u64;
        let projectors: u64 = self
            .z_dims
            .iter()
            .map(|&width| {
                product(tokens, hidden, middle)
                    + product(tokens, middle, middle)
                    + product(tokens, middle, width as u64)
            })
            .sum();
        self.depth as u64 * block + ends + projectors
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// DiT's paper (Peebles and Xie, arXiv 2212.09748, table 4) counts a multiplication and addition as one: S/2 6.06,
    /// B/2 23.0, L/2 80.7 and XL/2 118.6 billion, without projectors.
    #[test]
    fn the_forward_pass_is_the_papers() {
        for (preset, billions) in
            [("SiT-S/2", 6.06), ("SiT-B/2", 23.01), ("SiT-L/2", 80.71), ("SiT-XL/2", 118.64)]
        {
            let sit = SitConfig { z_dims: Vec::new(), ..SitConfig::preset(preset).unwrap() };
            let ours = sit.forward_flops() as f64 / 2e9;
            assert!((ours / billions - 1.0).abs() < 0.02, "{preset}: {ours}");
        }
    }

    #[test]
    fn projectors_come_on_top() {
        let sit = SitConfig::preset("SiT-B/2").unwrap();
        let without = SitConfig { z_dims: Vec::new(), ..sit.clone() };
        let tokens = sit.tokens() as u64;
        let (h, p, z) = (sit.hidden_size as u64, sit.projector_dim as u64, sit.z_dims[0] as u64);
        let expected = 6 * tokens * (h * p + p * p + p * z);
        assert_eq!(sit.training_flops() - without.training_flops(), expected);
    }
}
