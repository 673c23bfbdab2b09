//go:build !linux

package ubiflash

import (
	"errors"

	"github.com/slotota/ota"
)

// errBadVolume stands for EBADF in tests.
var errBadVolume = errors.New("bad file descriptor")

func openVolume(string, bool) (volume, error) { return nil, ota.ErrUnsupported }

func renameVolumes(string, []Pair) error { return ota.ErrUnsupported }
