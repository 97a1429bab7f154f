//! `repa-dist data import`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use repa_comm::all_or_first_error;
use repa_trainer::data::import::{ImportOptions, Layout, import};
use repa_trainer::data::store::Precision;

use super::super::{on_all_ranks, rank_threads};
use super::{BuildBar, say_built};
use crate::exit::{Failure, Outcome};

#[derive(Debug, Args)]
pub struct Arguments {
    /// Folder that holds vae-sd/ and images/ (or vae-sd.zip and images.zip), or LightningDiT's
    /// latents*.safetensors
    #[arg(value_name = "ROOT")]
    root: PathBuf,
    /// Folder of the store
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Layout of ROOT; by default the one that is recognised
    #[arg(long, value_enum)]
    layout: Option<LayoutName>,
    /// Keep the images as well
    #[arg(long)]
    images: bool,
    /// The moments are mean and log variance, not mean and standard deviation
    #[arg(long)]
    logvar: bool,
    /// Scale of the latents; by default 0.18215 (REPA), or 1 after LightningDiT's statistics
    #[arg(long, value_name = "X")]
    scale: Option<f32>,
    /// Pixels to a latent pixel; by default 8 (REPA) or 16 (LightningDiT)
    #[arg(long, value_name = "N")]
    downsample: Option<usize>,
    /// Name of the autoencoder that made the latents, kept with them
    #[arg(long, value_name = "NAME")]
    autoencoder: Option<String>,
    /// Store latents in float16: half the size
    #[arg(long)]
    f16: bool,
    /// Number of classes; by default one more than the greatest label
    #[arg(long, value_name = "N")]
    classes: Option<usize>,
    /// Samples of a shard; by default as many as make 1 GiB
    #[arg(long, value_name = "N", default_value_t = 0)]
    shard_len: usize,
    /// Bad members that are left out and listed, before it is an error
    #[arg(long, value_name = "N", default_value_t = 0)]
    max_bad: usize,
    /// Threads of a rank; 0 takes its share of the processors
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: usize,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LayoutName {
    /// vae-sd/dataset.json, vae-sd/*/*.npy and images/: REPA's and EDM2's
    Repa,
    /// *.safetensors with latents, latents_flip and labels, and latents_stats.pt
    Lightning,
}

pub fn run(arguments: &Arguments) -> Result<Outcome, Failure> {
    let options = ImportOptions {
        layout: arguments.layout.map(|name| match name {
            LayoutName::Repa => Layout::Repa,
            LayoutName::Lightning => Layout::Lightning,
        }),
        autoencoder: arguments.autoencoder.clone(),
        logvar: arguments.logvar,
        scale: arguments.scale,
        downsample: arguments.downsample,
        classes: arguments.classes,
        images: arguments.images,
        precision: if arguments.f16 { Precision::F16 } else { Precision::F32 },
        shard_len: arguments.shard_len,
        max_bad: arguments.max_bad,
    };
    on_all_ranks(|comm| {
        all_or_first_error(comm, rank_threads(comm, arguments.threads).map_err(|e| e.of_rank()))?;
        let mut bar = BuildBar::new(comm, "importing", "samples");
        let (built, report) = import(comm, &arguments.root, &arguments.out, &options, &mut |p| bar.show(p))?;
        bar.done();
        if comm.rank() == 0 {
            list_some("latents that dataset.json does not list", &report.unlisted);
            list_some("images without latents", &report.images_without_latents);
            say_built(&arguments.out, &built);
        }
        Ok(())
    })
}

/// Names a few of many.
fn list_some(what: &str, names: &[String]) {
    if !names.is_empty() {
        let some = names.iter().take(5).map(String::as_str).collect::<Vec<_>>().join(", ");
        eprintln!("{} {what}: {some}{}", names.len(), if names.len() > 5 { ", ..." } else { "" });
    }
}
