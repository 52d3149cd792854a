module hydracore.io/sealer

go 1.26.0
