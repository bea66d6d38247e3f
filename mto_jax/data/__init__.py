"""Input: TFDS sources, the tf.data host pipeline, and augmentation on the device."""
