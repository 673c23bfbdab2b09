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
// UBI volume, such as /dev/ubi0_1 or /dev/ubi0:env; for Config.OpenFlash. What it opens
// stays open until the process ends. It needs Linux.
//
// On NAND the copy may be anywhere in the sectors that l allows, because bad blocks are
// skipped. Its flags count up, as in UBI volumes; on NOR and DataFlash they are
// [Boolean] (u-boot, tools/env/fw_env.c).
func OpenDevice(l Location) (ota.Flash, Flags, error) {
	if strings.HasPrefix(filepath.Base(l.Path), "ubi") {
		if l.Offset != 0 {
			return nil, 0, fmt.Errorf("%s: offset %d in a UBI volume: %w", ota.Quote(l.Path), l.Offset, ota.ErrInvalid)
		}
		f, err := ubiflash.Open(l.Path, &ubiflash.Options{Size: l.Size})
		if err != nil {
			return nil, 0, err
		}
		return volume{f}, Incremental, nil
	}
	f, err := mtdflash.Open(l.Path, mtdOptions(l))
	if err != nil {
		return nil, 0, err
	}
	return f, mtdFlags(f.Info().Kind), nil
}

// volume is a UBI volume with a copy. One whose update was interrupted cannot be read:
// it is no copy, and not one that might be the newer one.
type volume struct{ ota.Flash }

func (v volume) ReadAt(p []byte, off int64) (int, error) {
	n, err := v.Flash.ReadAt(p, off)
	if errors.Is(err, ubiflash.ErrInterrupted) {
		clear(p)
		return len(p), nil
	}
	return n, err
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
