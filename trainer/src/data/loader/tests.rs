use super::*;
use crate::data::bench::{imagenet_spec, synthetic_store};
use crate::data::store::{EncoderSpec, Sample, StoreSpec, StoreWriter, View};
use proptest::prelude::*;
use tempfile::TempDir;

const SAMPLES: usize = 23;

fn store(kind: Kind) -> (TempDir, Arc<LatentStore>) {
    let folder = tempfile::tempdir().unwrap();
    let encoders = [("a", 2, 3), ("b", 2, 5)]
        .map(|(id, tokens, dim)| EncoderSpec { id: id.to_owned(), tokens, dim })
        .to_vec();
    let spec = StoreSpec { kind, encoders, height: 4, width: 4, images: true, ..imagenet_spec(false) };
    let dir = folder.path().join("store");
    synthetic_store(&dir, spec, SAMPLES, 5).unwrap();
    (folder, Arc::new(LatentStore::open(&dir).unwrap()))
}

fn plan(global_batch: usize) -> LoaderPlan {
    LoaderPlan { seed: 9, global_batch, label_drop: 0.3, images: true, ..LoaderPlan::default() }
}

/// A batch cut into its samples: everything of one sample, by its number.
fn rows(batch: &Batch) -> Vec<(u64, Batch)> {
    let n = batch.len();
    let cut = |x: &[f32], i: usize| x[i * (x.len() / n)..(i + 1) * (x.len() / n)].to_vec();
    batch
        .samples
        .clone()
        .enumerate()
        .map(|(i, sample)| {
            let row = Batch {
                samples: sample..sample + 1,
                indices: vec![batch.indices[i]],
                latents: cut(&batch.latents, i),
                posterior_eps: cut(&batch.posterior_eps, i),
                noise: cut(&batch.noise, i),
                time_uniform: cut(&batch.time_uniform, i),
                time_normal: cut(&batch.time_normal, i),
                labels: vec![batch.labels[i]],
                labels_original: vec![batch.labels_original[i]],
                features: batch
                    .features
                    .iter()
                    .map(|f| f[i * (f.len() / n)..(i + 1) * (f.len() / n)].to_vec())
                    .collect(),
                flipped: vec![batch.flipped[i]],
                images: batch.images.get(i).cloned().into_iter().collect(),
                pixels: cut(&batch.pixels, i),
            };
            (sample, row)
        })
        .collect()
}

/// The samples of `steps` steps of a plan, over all its ranks.
fn collect(store: &Arc<LatentStore>, plan: &LoaderPlan, steps: usize) -> Vec<(u64, Batch)> {
    let mut all = Vec::new();
    for rank in 0..plan.world {
        let mut loader = Loader::start(Arc::clone(store), LoaderPlan { rank, ..plan.clone() }).unwrap();
        for _ in 0..steps {
            let (batch, _) = loader.next().unwrap();
            all.extend(rows(&batch));
            loader.recycle(batch);
        }
    }
    all.sort_by_key(|(sample, _)| *sample);
    all
}

#[test]
fn the_world_size_and_the_threads_change_nothing() {
    let (_folder, store) = store(Kind::Moments);
    let one = collect(&store, &plan(7), 6);
    assert!(one.iter().map(|r| r.0).eq(0..42), "every sample number once");
    for world in 2..=4 {
        let plan = LoaderPlan { world, threads: world - 1, queue_depth: 5 - world, ..plan(7) };
        assert!(collect(&store, &plan, 6) == one, "{world} ranks");
    }
    // More ranks than samples: some get none, and none is lost.
    let three = collect(&store, &LoaderPlan { world: 5, ..plan(3) }, 14);
    assert!(three == one, "5 ranks, 3 samples a step");
}

#[test]
fn a_batch_holds_the_stored_sample_and_the_draws_of_its_number() {
    for kind in [Kind::Moments, Kind::Latents] {
        let (_folder, store) = store(kind);
        let spec = &store.index().contents;
        let order = Order::new(9, SAMPLES);
        for (sample, row) in collect(&store, &LoaderPlan { start_sample: 20, ..plan(5) }, 3) {
            let i = order.index(sample);
            let mut latent = vec![0.0; spec.stored_len()];
            store.latent(i, false, &mut latent).unwrap();
            assert_eq!((row.indices[0], &row.latents), (i, &latent));
            assert_eq!(row.labels_original[0], store.label(i).unwrap());
            let mut normal = vec![0.0; spec.latent_len()];
            Draws::new(9, Purpose::Noise).normal(sample, &mut normal);
            assert_eq!(row.noise, normal);
            Draws::new(9, Purpose::Posterior).normal(sample, &mut normal);
            match kind {
                Kind::Moments => assert_eq!(row.posterior_eps, normal),
                Kind::Latents => assert!(row.posterior_eps.is_empty()),
            }
            let mut image = Vec::new();
            store.image(i, &mut image).unwrap();
            assert_eq!(row.images[0], image);
        }
    }
}

#[test]
fn about_half_of_the_samples_are_mirrored_and_the_world_size_changes_none() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("store");
    let spec = StoreSpec { kind: Kind::Latents, height: 2, width: 2, flips: true, ..imagenet_spec(false) };
    let writer = StoreWriter::create(&dir, spec).unwrap();
    let mut shard = writer.shard(0, SAMPLES).unwrap();
    for i in 0..SAMPLES {
        let [a, b] = [i as f32, -1.0 - i as f32].map(|x| vec![x; 16]);
        let view = View { latent: &a, features: &[] };
        let flipped = Some(View { latent: &b, features: &[] });
        shard.push(&Sample { label: 0, view, flipped, image: &[] }).unwrap();
    }
    shard.finish().unwrap();
    writer.commit(1).unwrap();
    let store = Arc::new(LatentStore::open(&dir).unwrap());
    let plan = LoaderPlan { images: false, flip: true, ..plan(50) };
    let rows = collect(&store, &plan, 20);
    for (sample, row) in &rows {
        let i = row.indices[0] as f32;
        let expected = if row.flipped[0] { -1.0 - i } else { i };
        assert!(row.latents.iter().all(|&x| x == expected), "sample {sample}");
    }
    let flipped = rows.iter().filter(|(_, r)| r.flipped[0]).count();
    assert!((430..570).contains(&flipped), "{flipped} of 1000");
    assert!(collect(&store, &LoaderPlan { world: 3, ..plan.clone() }, 20) == rows);
    let straight = collect(&store, &LoaderPlan { flip: false, ..plan }, 20);
    assert!(straight.iter().all(|(_, r)| !r.flipped[0]));
}

/// The first byte of an image; one image is bad.
struct First {
    bad: Option<Vec<u8>>,
}

impl ImageTransform for First {
    fn len(&self) -> usize {
        1
    }

    fn apply(&self, encoded: &[u8], _flipped: bool, out: &mut [f32]) -> Result<(), String> {
        if self.bad.as_deref() == Some(encoded) {
            return Err("is no image".to_owned());
        }
        out[0] = f32::from(encoded[0]);
        Ok(())
    }
}

#[test]
fn images_go_through_the_transform_and_a_bad_one_is_named() {
    let (_folder, store) = store(Kind::Moments);
    let start = |bad: Option<Vec<u8>>| {
        let plan = LoaderPlan { images: false, threads: 2, ..plan(4) };
        Loader::start_with(Arc::clone(&store), plan, Some(Arc::new(First { bad }))).unwrap()
    };
    let mut loader = start(None);
    for _ in 0..20 {
        let (batch, _) = loader.next().unwrap();
        let expected: Vec<f32> = batch.images.iter().map(|image| f32::from(image[0])).collect();
        assert_eq!(batch.pixels, expected);
        loader.recycle(batch);
    }
    let mut bad = Vec::new();
    store.image(7, &mut bad).unwrap();
    let mut loader = start(Some(bad));
    let error = (0..20).find_map(|_| loader.next().err()).expect("sample 7 comes once an epoch").to_string();
    assert!(error.contains("the image of sample 7 of") && error.contains("is no image"), "{error}");
}

#[test]
fn labels_are_dropped_at_the_rate_asked_for() {
    let (_folder, store) = store(Kind::Latents);
    let rows = collect(&store, &plan(100), 40);
    let null = store.index().contents.classes as u32;
    assert!(rows.iter().all(|(_, r)| r.labels[0] == null || r.labels == r.labels_original));
    assert!(rows.iter().all(|(_, r)| r.labels_original[0] < null));
    let dropped = rows.iter().filter(|(_, r)| r.labels[0] == null).count();
    // 1200 expected, standard deviation 29.
    assert!((1080..1320).contains(&dropped), "{dropped} of 4000 at 0.3");
    assert!(rows.iter().all(|(_, r)| (0.0..1.0).contains(&r.time_uniform[0])));
    let mean: f32 = rows.iter().map(|(_, r)| r.time_normal[0]).sum::<f32>() / 4000.0;
    assert!(mean.abs() < 0.08, "mean of the normal time draws: {mean}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn a_run_goes_on_at_any_sample(start in 0u64..30, global_batch in 1usize..9, world in 1usize..4) {
        let (_folder, store) = store(Kind::Moments);
        let whole = collect(&store, &plan(40), 1);
        let resumed = LoaderPlan { start_sample: start, world, ..plan(global_batch) };
        let part = collect(&store, &resumed, 1);
        prop_assert_eq!(part.len(), global_batch);
        for (sample, row) in &part {
            prop_assert!(*row == whole[*sample as usize].1);
        }
    }
}

#[test]
fn a_shard_that_vanishes_ends_the_loader_with_one_clear_error() {
    let (_folder, store) = store(Kind::Moments);
    std::fs::remove_file(store.dir().join("shard-00002.safetensors")).unwrap();
    let mut loader = Loader::start(Arc::clone(&store), LoaderPlan { threads: 2, ..plan(2) }).unwrap();
    let mut batches = 0;
    let error = loop {
        match loader.next() {
            Ok(_) => batches += 1,
            Err(e) => break e.to_string(),
        }
    };
    assert!(error.contains("shard-00002.safetensors: is missing"), "{error}");
    assert!(batches < SAMPLES / 2, "{batches} batches before the error");
    assert!(matches!(loader.next(), Err(LoaderError::Ended)));
}

#[test]
fn a_shard_cut_short_during_the_run_is_an_error() {
    let (_folder, store) = store(Kind::Moments);
    let mut loader = Loader::start(Arc::clone(&store), plan(SAMPLES)).unwrap();
    loader.next().unwrap();
    let path = store.dir().join("shard-00000.safetensors");
    std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(1000).unwrap();
    // What was read ahead is still good.
    let error = (0..20).find_map(|_| loader.next().err()).expect("an error").to_string();
    assert!(error.contains("shard-00000.safetensors: is cut short"), "{error}");
}

#[test]
fn a_plan_that_makes_no_sense_is_named() {
    let (_folder, store) = store(Kind::Moments);
    for (plan, part) in [
        (LoaderPlan { global_batch: 0, ..plan(1) }, "global_batch is 0"),
        (LoaderPlan { threads: 0, ..plan(1) }, "threads is 0"),
        (LoaderPlan { queue_depth: 0, ..plan(1) }, "queue_depth is 0"),
        (LoaderPlan { label_drop: 1.5, ..plan(1) }, "label_drop is 1.5"),
        (LoaderPlan { rank: 2, world: 2, ..plan(1) }, "rank is 2"),
    ] {
        let error = Loader::start(Arc::clone(&store), plan).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
}
