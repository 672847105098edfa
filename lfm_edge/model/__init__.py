"""The one definition of the network, functional over an explicit state. See `decoder.Decoder`."""
