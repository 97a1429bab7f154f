//! `repa-dist data encode`.

use std::path::PathBuf;

use clap::Args;
use repa_comm::{Communicator, all_or_first_error};
use repa_trainer::Device;
use repa_trainer::autoencoder::Autoencoder;
use repa_trainer::data::build::BuildOptions;
use repa_trainer::data::encode::{Models, encode};
use repa_trainer::data::import::RepaTree;
use repa_trainer::data::source::images::{ImageSource, ImageTree, StoreImages};
use repa_trainer::data::store::{INDEX_FILE, Precision, StoreSpec};
use repa_trainer::encoder::VisionEncoder;
use repa_trainer::{data, train};

use super::super::{on_all_ranks, rank_threads};
use super::{BuildBar, say_built};
use crate::exit::{Failure, Outcome};

const NOTE: &str = "With a store or REPA's layout as SOURCE, --autoencoder may be left out: its latents are kept, and \
features of its images are added.";

#[derive(Debug, Args)]
#[command(after_help = NOTE)]
pub struct Arguments {
    /// Folder or zip archive of images (a folder a class, or with dataset.json), a store that keeps
    /// images, or a folder that holds REPA's vae-sd/ and images/
    #[arg(value_name = "SOURCE")]
    source: PathBuf,
    /// Folder of the store
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Weight file of the autoencoder (SD-VAE in diffusers' layout, or the TAESD family), or `quickstart`
    #[arg(long, value_name = "FILE")]
    autoencoder: Option<PathBuf>,
    /// Weight file of a vision encoder whose features are stored, with its family where that is needed
    /// (`mae:FILE`), or `quickstart-teacher`; may be repeated
    #[arg(long = "encoder", value_name = "FILE")]
    encoders: Vec<PathBuf>,
    /// Width and height that images are cropped to; by default 256, or the source store's
    #[arg(long, value_name = "PIXELS")]
    resolution: Option<usize>,
    /// Labels of the images: JSON or CSV of file and label (by default dataset.json, or folder names)
    #[arg(long, value_name = "FILE")]
    labels: Option<PathBuf>,
    /// Keep the images as well
    #[arg(long)]
    images: bool,
    /// Store latents and features of the mirrored images too, for data.flip=true
    #[arg(long)]
    flips: bool,
    /// Store latents in float16: half the size
    #[arg(long)]
    f16: bool,
    /// Number of classes; by default one more than the greatest label
    #[arg(long, value_name = "N")]
    classes: Option<usize>,
    /// Images that go through the models at once
    #[arg(long, value_name = "N", default_value_t = 32)]
    batch: usize,
    /// Samples of a shard; by default as many as make 1 GiB
    #[arg(long, value_name = "N", default_value_t = 0)]
    shard_len: usize,
    /// Bad images that are left out and listed, before it is an error
    #[arg(long, value_name = "N", default_value_t = 0)]
    max_bad: usize,
    /// Where the models run: cpu, cuda:N, or cuda for one GPU a local rank
    #[arg(long, value_name = "DEVICE", default_value = "cpu")]
    device: String,
    /// Threads of a rank on the CPU; 0 takes its share of the processors
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: usize,
}

pub fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    on_all_ranks(|comm| {
        let prepared = all_or_first_error(comm, prepare(comm, arguments).map_err(|e| e.of_rank()))?;
        let (source, models, spec) = prepared;
        let options = BuildOptions {
            batch: arguments.batch.max(1),
            shard_len: arguments.shard_len,
            max_bad: arguments.max_bad,
        };
        let mut bar = BuildBar::new(comm, "encoding", "images");
        let run = |batch: &[_]| models.run(batch);
        let built =
            encode(comm, source.as_ref(), &arguments.out, &spec, &options, &run, &mut |p| bar.show(p))?;
        bar.done();
        if comm.rank() == 0 {
            say_built(&arguments.out, &built);
        }
        Ok(())
    })
}

type Prepared = (Box<dyn ImageSource>, Models, StoreSpec);

/// Opens everything that a rank needs.
fn prepare(comm: &dyn Communicator, arguments: &Arguments) -> Result<Prepared, Failure> {
    rank_threads(comm, arguments.threads)?;
    let device = train::device(&arguments.device, comm.local_rank())?;
    let models = models(arguments, device)?;
    let (source, spec) = open_source(arguments)?;
    if models.autoencoder.is_none() && spec.channels == 0 {
        return Err(Failure::usage(
            "--autoencoder is missing: images need one (a weight file, or quickstart) to become latents",
        ));
    }
    if models.autoencoder.is_none() && models.encoders.is_empty() {
        return Err(Failure::usage("nothing to do: name an --autoencoder, an --encoder, or both"));
    }
    let spec = StoreSpec {
        precision: if arguments.f16 { Precision::F16 } else { Precision::F32 },
        images: arguments.images,
        flips: arguments.flips,
        classes: arguments.classes.unwrap_or(spec.classes),
        ..spec
    };
    let spec = models.complete(spec).map_err(|e| Failure::of(e.kind(), &e))?;
    Ok((source, models, spec))
}

fn models(arguments: &Arguments, device: Device) -> Result<Models, Failure> {
    let autoencoder = match &arguments.autoencoder {
        Some(name) => Some(Autoencoder::named(name, &device)?),
        None => None,
    };
    let encoders = arguments
        .encoders
        .iter()
        .map(|name| VisionEncoder::named(name, &device).map_err(Failure::data))
        .collect::<Result<_, _>>()?;
    Ok(Models { autoencoder, encoders, device })
}

/// The images, and what is known of the store before the models are asked.
fn open_source(arguments: &Arguments) -> Result<(Box<dyn ImageSource>, StoreSpec), Failure> {
    let root = &arguments.source;
    let failure = |e: data::build::BuildError| Failure::of(e.kind(), &e);
    if root.join(INDEX_FILE).exists() || RepaTree::is_at(root) {
        if let Some(path) = &arguments.labels {
            return Err(Failure::usage(format!(
                "--labels {}: {} has labels of its own",
                path.display(),
                root.display()
            )));
        }
        let source = StoreImages::new(data::open(root)?).map_err(failure)?;
        let spec = source.spec().clone();
        if let Some(asked) = arguments.resolution.filter(|&r| r != spec.resolution) {
            return Err(Failure::usage(format!(
                "--resolution {asked}: the images of {} are of {} pixels",
                root.display(),
                spec.resolution
            )));
        }
        // The numbers that training sees stay what they are, also where they were measured.
        let normalisation = Some(source.store().index().normalisation.clone());
        return Ok((Box::new(source), StoreSpec { normalisation, ..spec }));
    }
    let resolution = arguments.resolution.unwrap_or(256);
    if resolution == 0 || resolution > 1 << 14 {
        return Err(Failure::usage(format!("--resolution {resolution}: 1 to {} pixels", 1 << 14)));
    }
    let tree = ImageTree::open(root, arguments.labels.as_deref(), resolution).map_err(failure)?;
    let spec = StoreSpec {
        class_names: tree.class_names().to_vec(),
        source: tree.describe(),
        ..StoreSpec::of_images(resolution, tree.classes())
    };
    Ok((Box::new(tree), spec))
}
