//! autoencoder
