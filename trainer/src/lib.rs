//! The science and the training loop of repa-dist: SiT with representation alignment (REPA,
//! arXiv 2410.06940). This crate knows other ranks only through [`repa_comm::Communicator`].

pub mod autoencoder;
pub mod checkpoint;
pub mod config;
pub mod data;
pub mod encoder;
pub mod estimate;
pub mod evaluate;
pub mod exit;
pub mod figures;
pub mod flat;
pub mod generate;
pub mod gpu_failure;
pub mod images;
pub mod model;
pub mod nn;
pub mod objective;
pub mod ops;
pub mod optim;
pub mod params;
pub mod quickstart;
pub mod sample;
pub mod telemetry;
pub mod train;
pub mod weights;

pub use burn::tensor::{Device, Tensor};
