//! What training reads: which sample when (order) and on which rank (batch), its random numbers
//! (draws), where its latents, labels and features lie (store), how they get to the training thread
//! (loader), and how they come to be there: from images (encode) or other people's files (import).

pub mod batch;
pub mod bench;
pub mod draws;
pub mod emoji;
pub mod encode;
pub mod import;
pub mod loader;
pub mod order;
pub mod store;
