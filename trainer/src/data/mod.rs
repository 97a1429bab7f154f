//! What training reads: which sample when (order), its random numbers (draws), and where its
//! latents, labels and features lie (store, loader).

pub mod draws;
pub mod emoji;
