//! The times at which the samplers evaluate the model.

/// `points` numbers from `start` to `end`, as `torch.linspace(start, end, points, dtype=float64)`
/// gives them on a CPU, bit for bit: the first half counts from `start`, the second back from `end`,
/// each by one fused multiply-add (PyTorch's kernels for AVX2 and AVX-512 are compiled so). A guidance
/// interval with a bound on the grid (0.2 with 50 steps) contains that point only then.
pub fn linspace(start: f64, end: f64, points: usize) -> Vec<f64> {
    if points == 1 {
        return vec![start];
    }
    let step = (end - start) / (points - 1) as f64;
    (0..points)
        .map(|i| {
            if i < points / 2 {
                step.mul_add(i as f64, start)
            } else {
                (-step).mul_add((points - 1 - i) as f64, end)
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::linspace;

    /// Values of PyTorch 2.15; counting from 1 alone, or without the fused operation, misses them.
    #[test]
    fn times_are_those_of_torch() {
        let times = linspace(1.0, 0.0, 21);
        assert_eq!(times[0], 1.0);
        assert_eq!(times[7], 0.65);
        assert_eq!(times[9], 0.5499999999999999);
        assert_eq!(times[10], 0.5);
        assert_eq!(times[16], 0.2);
        assert_eq!(times[20], 0.0);
        assert_eq!(times.len(), 21);
        let times = linspace(1.0, 0.0, 51);
        assert_eq!(times[25], 0.5);
        assert_eq!(times[40], 0.2);
        assert_eq!(times[49], 0.02);
        assert_eq!(times.len(), 51);
        let times = linspace(1.0, 0.04, 7);
        assert_eq!(times[0], 1.0);
        assert_eq!(times[1], 0.84);
        assert_eq!(times[2], 0.6799999999999999);
        assert_eq!(times[3], 0.52);
        assert_eq!(times[4], 0.36);
        assert_eq!(times[5], 0.2);
        assert_eq!(times[6], 0.04);
        assert_eq!(times.len(), 7);
        let times = linspace(1.0, 0.04, 250);
        assert_eq!(times[1], 0.996144578313253);
        assert_eq!(times[100], 0.6144578313253012);
        assert_eq!(times[200], 0.2289156626506024);
        assert_eq!(times[249], 0.04);
        assert_eq!(times.len(), 250);
        assert_eq!(linspace(1.0, 0.04, 1), [1.0]);
    }
}
