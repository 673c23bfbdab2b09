package uboot

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/slotota/ota"
	"github.com/slotota/ota/flash/mtdflash"
	"github.com/slotota/ota/flash/ubiflash"
)

// OpenDevice opens the storage of a copy on an MTD device, such as /dev/mtd0, or in a
// UBI volume, such as /dev/ubi0_1 or /dev/ubi0:env; for Config.OpenFlash. An MTD
// device stays open until the process ends. It needs Linux.
//
// On NAND the copy may be anywhere in the sectors that l allows, because bad blocks are
// skipped. Its flags count up, as in UBI volumes; on NOR and DataFlash they are
// [Boolean] (u-boot, tools/env/fw_env.c).
func OpenDevice(l Location) (ota.Flash, Flags, error) {
	if strings.HasPrefix(filepath.Base(l.Path), "ubi") {
		if l.Offset != 0 {
			return nil, 0, fmt.Errorf("%s: offset %d in a UBI volume: %w", ota.Quote(l.Path), l.Offset, ota.ErrInvalid)
		}
		return &volume{path: l.Path, size: l.Size}, Incremental, nil
	}
	f, err := mtdflash.Open(l.Path, mtdOptions(l))
	if err != nil {
		return nil, 0, err
	}
	return f, mtdFlags(f.Info().Kind), nil
}

// volume is a UBI volume with a copy. It is opened for each access, because nobody else
// can open it to write meanwhile.
type volume struct {
	path string
	size int64
}

func (v *volume) Size() int64 { return v.size }

func (v *volume) Sync() error { return nil } // see WriteAt

func (v *volume) ReadAt(p []byte, off int64) (int, error) {
	f, err := ubiflash.Open(v.path, &ubiflash.Options{Size: v.size, ReadOnly: true})
	if err != nil {
		return 0, err
	}
	n, err := readCopy(f, p, off)
	return n, errors.Join(err, f.Close())
}

// readCopy reads from a volume. One whose update was interrupted cannot be read: it holds
// no copy, and not one that might be the newer one.
func readCopy(f ota.Flash, p []byte, off int64) (int, error) {
	n, err := f.ReadAt(p, off)
	if errors.Is(err, ubiflash.ErrInterrupted) {
		clear(p)
		return len(p), nil
	}
	return n, err
}

// WriteAt takes a whole copy. It returns when the bytes are on the medium.
func (v *volume) WriteAt(p []byte, off int64) (int, error) {
	if off != 0 || int64(len(p)) != v.size {
		return 0, fmt.Errorf("%s: %d bytes at %d, not all %d: %w", ota.Quote(v.path), len(p), off, v.size, ota.ErrInvalid)
	}
	f, err := ubiflash.Open(v.path, &ubiflash.Options{Size: v.size})
	if err != nil {
		return 0, err
	}
	n, err := f.WriteAt(p, 0)
	return n, errors.Join(err, f.Close())
}

// mtdOptions limit what is used of a device to the sectors of l: as many as the copy
// needs, unless l names more. mtdflash rounds up to whole blocks.
func mtdOptions(l Location) *mtdflash.Options {
	sector := l.SectorSize
	if sector == 0 {
		sector = l.Size
	}
	n := max(l.Sectors, (l.Size+sector-1)/sector)
	return &mtdflash.Options{Offset: l.Offset, Length: n * sector, Size: l.Size}
}

func mtdFlags(k mtdflash.Kind) Flags {
	if k == mtdflash.NOR || k == mtdflash.DataFlash {
		return Boolean
	}
	return Incremental
}
