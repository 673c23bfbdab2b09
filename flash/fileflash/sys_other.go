//go:build !linux

package fileflash

import (
	"errors"
	"io/fs"
	"os"

	"github.com/slotota/ota"
)

var errNotDirect = errors.New("not past the page cache")

func openDirect(*os.File, bool) handle { return nil }

func dropCache(*os.File) {}

func zero(*os.File, bool, int64, int64) error { return ota.ErrUnsupported }

// Block devices are only guarded on Linux.
const claim = 0

func isBusy(error) bool { return false }

func allocate(*os.File, int64) error { return nil }

func mounted(_ fs.FileInfo, _, _ string) error { return nil }
