use super::*;

/// A preset as `train` sees it, in float32 on the CPU.
fn preset(name: &str, global_batch: usize) -> Config {
    let sit = SitConfig::preset(name).unwrap();
    let mut config = Config::default();
    config.model.hidden_size = sit.hidden_size;
    config.model.depth = sit.depth;
    config.model.num_heads = sit.num_heads;
    config.model.patch_size = sit.patch_size;
    config.alignment.encoder_depth = sit.encoder_depth;
    config.train.global_batch = global_batch;
    config
}

fn job(ranks: usize, shards: usize) -> Job {
    Job { ranks, shards, threads: 2 }
}

fn bytes(estimate: &Estimate, part: Part) -> u64 {
    estimate.lines.iter().filter(|l| l.part == part).map(|l| l.bytes).sum()
}

#[test]
fn flat_arrays_are_the_presets_parameters() {
    for name in crate::model::PRESETS {
        let config = preset(name, 8);
        let layout = config.sit().layout();
        let figures = estimate(&config, &job(1, 1));
        let flat = 4 * layout.trainable_len() as u64;
        assert_eq!(figures.parameters, layout.total_len() as u64, "{name}");
        assert_eq!(bytes(&figures, Part::Parameters), flat, "{name}");
        assert_eq!(bytes(&figures, Part::Gradients), flat, "{name}");
        assert_eq!(bytes(&figures, Part::Moments), 2 * flat, "{name}");
        assert_eq!(bytes(&figures, Part::Ema), flat, "{name}");
        assert_eq!(bytes(&figures, Part::WorkingCopy), 4 * layout.total_len() as u64, "{name}");
        let sum = figures.lines.iter().map(|l| l.bytes).sum::<u64>();
        assert_eq!((figures.host_bytes, figures.device_bytes), (sum, 0), "{name}");
    }
}

/// Moments and EMA are divided, rounded up; weights and gradients are not.
#[test]
fn zero1_divides_moments_and_ema() {
    let config = preset("SiT-S/2", 12);
    let trainable = config.sit().layout().trainable_len() as u64;
    for ranks in [2, 3, 5, 12] {
        let [whole, shared] = [1, ranks].map(|shards| estimate(&config, &job(ranks, shards)));
        let part = 4 * trainable.div_ceil(ranks as u64);
        assert_eq!(bytes(&shared, Part::Moments), 2 * part, "{ranks}");
        assert_eq!(bytes(&shared, Part::Ema), part, "{ranks}");
        for same in [Part::Parameters, Part::Gradients, Part::WorkingCopy, Part::Activations] {
            assert_eq!(bytes(&whole, same), bytes(&shared, same), "{ranks}");
        }
        assert_eq!(whole.host_bytes - shared.host_bytes, 12 * trainable - 3 * part, "{ranks}");
        for figures in [&whole, &shared] {
            assert_eq!(figures.sharding_saves_bytes, 12 * trainable - 3 * part, "{ranks}");
            let fraction = figures.sharding_saves_bytes as f64 / whole.host_bytes as f64;
            assert!((figures.sharding_saves_fraction - fraction).abs() < 1e-12, "{ranks}");
        }
    }
    assert_eq!(estimate(&config, &job(1, 1)).sharding_saves_bytes, 0);
}

#[test]
fn more_samples_need_more_and_micro_batches_less() {
    let host = |config: &Config| estimate(config, &job(1, 1)).host_bytes;
    for (precision, patch) in [(Precision::F32, 2), (Precision::Bf16, 2), (Precision::F16, 4)] {
        let mut last = 0;
        for batch in 1..20 {
            let mut config = preset("SiT-S/2", batch);
            config.train.precision = precision;
            config.model.patch_size = patch;
            let now = host(&config);
            assert!(now > last, "{precision:?}, batch {batch}");
            config.train.micro_batch = 1;
            assert!(host(&config) <= now, "{precision:?}, batch {batch}");
            last = now;
        }
    }
    let shares = [1, 2, 3, 8, 100].map(|ranks| estimate(&preset("SiT-S/2", 8), &job(ranks, 1)).rank_batch);
    assert_eq!(shares, [8, 4, 3, 1, 1]);
}

/// By hand, for one sample of SiT-S/2 in float32: 256 rows of 384, 6 heads, and one projector.
#[test]
fn activations_are_the_tables_sum() {
    let figures = estimate(&preset("SiT-S/2", 1), &job(1, 1));
    let row = 2 + 3 + 3 + 2 + 2 * 4;
    let block = 4 * (256 * row * 384 + 6 * 256 * 256 + 6 * 384);
    let projector = 4 * 256 * (4 * 2048 + 2 * 768);
    let ends = 4 * (256 * (2 * 384 + 16) + 256 + 8 * 384);
    let inputs = 4 * 7 * 4 * 32 * 32;
    assert_eq!(bytes(&figures, Part::Activations), 12 * block + projector + ends + inputs);
    // Without projectors, those go; and the gradients of the last block count.
    let mut plain = preset("SiT-S/2", 1);
    plain.alignment.z_dims.clear();
    let without = estimate(&plain, &job(1, 1));
    assert_eq!(bytes(&without, Part::Activations), 12 * block + ends + inputs);
    let weights = 4 * 18 * 384 * 384;
    assert!(bytes(&without, Part::Workspace) < weights);
}

/// In half precision on the CPU the residual stream's operations stay fused and in float32.
#[test]
fn half_precision_halves_what_matrix_products_keep() {
    let mut config = preset("SiT-S/2", 1);
    config.train.precision = Precision::Bf16;
    config.alignment.z_dims.clear();
    let figures = estimate(&config, &job(1, 1));
    let (rows, hidden, mlp) = (256, 384, 4 * 384);
    let block = rows * (4 * 4 * hidden + 6 * 2 * hidden + 4 * 2 * mlp + 10 * 6 * 256) + 4 * 6 * hidden;
    let ends = rows * (4 * hidden + 2 * hidden + 2 * 16) + 4 * (256 + 8 * hidden);
    assert_eq!(bytes(&figures, Part::Activations), 12 * block + ends + 4 * 7 * 4 * 32 * 32);
    // The matrices are there twice; the table of labels is not.
    let layout = config.sit().layout();
    let cast = layout.trainable_len() - 1001 * 384;
    assert_eq!(bytes(&figures, Part::WorkingCopy), (4 * layout.total_len() + 2 * cast) as u64);
}

#[test]
fn a_gpu_has_what_a_step_works_on_and_the_host_the_rest() {
    let mut config = preset("SiT-B/2", 8);
    config.device.0 = "cuda:0".into();
    config.train.precision = Precision::Bf16;
    let figures = estimate(&config, &job(2, 2));
    let on_host = [Part::Loader, Part::Snapshot, Part::Communication, Part::Process];
    for line in &figures.lines {
        let expected = if on_host.contains(&line.part) { Place::Host } else { Place::Device };
        assert_eq!(line.place, expected, "{line:?}");
    }
    // A bucket's worth of gradients waits for the rest of it; without overlap all wait for all.
    let trainable = 4 * config.sit().layout().trainable_len() as u64;
    assert_eq!(bytes(&figures, Part::Gradients), trainable + ((config.comm.bucket_mib as u64) << 20));
    config.comm.overlap = false;
    assert_eq!(bytes(&estimate(&config, &job(2, 2)), Part::Gradients), 2 * trainable);
    assert!(figures.device_bytes > 0 && !figures.notes.is_empty());
}

#[test]
fn absurd_sizes_saturate() {
    let mut config = preset("SiT-S/2", 1 << 40);
    config.model.input_size = 1 << 14;
    config.model.depth = 64;
    let figures = estimate(&config, &Job { ranks: 0, shards: 0, threads: 0 });
    assert_eq!(figures.host_bytes, u64::MAX);
}
