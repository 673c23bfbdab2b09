//go:build !linux

package mtdflash

import (
	"errors"

	"github.com/slotota/ota"
)

func openMTD(string, bool) (mtd, error) { return nil, ota.ErrUnsupported }

// errIO stands for EIO in tests.
var errIO = errors.New("input/output error")
