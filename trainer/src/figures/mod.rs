//! Pictures for people, and sample files for other programs' evaluators.

mod curves;
mod grid;
mod npz;
mod output;
mod text;

pub use curves::{Panel, Series, loss_curves, whole};
pub use grid::{GridRow, labelled_grid};
pub use npz::NpzWriter;
pub use output::{check_place, write_png};

use std::path::PathBuf;

/// Why a figure cannot be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FigureError {
    /// The file cannot be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The images do not fit the figure.
    #[error("cannot arrange the images: {0}")]
    Images(String),
    /// The drawing library failed.
    #[error("cannot draw: {0}")]
    Draw(String),
}
