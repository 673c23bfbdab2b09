package bootrecord_test

import (
	"context"
	"path/filepath"
	"testing"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/bootrecord"
	"github.com/slotota/ota/boottest"
	"github.com/slotota/ota/crashtest"
	"github.com/slotota/ota/flash/memflash"
	"github.com/stretchr/testify/require"
)

var options = &bootrecord.Options{Running: func(context.Context) (ota.SlotID, error) { return 1, nil }}

func TestConformance(t *testing.T) {
	for _, g := range crashtest.Geometries() {
		t.Run(g.Name, func(t *testing.T) {
			cfg := g.Config(bootrecord.MaxSize)
			chip := memflash.NewChip(cfg, cfg, cfg)
			boottest.Run(t, func(t *testing.T) ota.Bootloader {
				r, err := bootrecord.New(chip.Flashes(), options)
				require.NoError(t, err)
				return boottest.OnChip(r, chip)
			})
			require.NoError(t, chip.Err())
		})
	}
	t.Run("split, 2 copies", func(t *testing.T) {
		chip := memflash.NewChip(memflash.Config{Size: 16 << 10, EraseSize: 4 << 10})
		boottest.Run(t, func(t *testing.T) ota.Bootloader {
			places, err := bootrecord.Split(chip.Flashes()[0], 2)
			require.NoError(t, err)
			r, err := bootrecord.New(places, options)
			require.NoError(t, err)
			return boottest.OnChip(r, chip)
		})
	})
	t.Run("files", func(t *testing.T) {
		dir := t.TempDir()
		boottest.Run(t, func(t *testing.T) ota.Bootloader {
			r, err := bootrecord.Files([]string{filepath.Join(dir, "a"), filepath.Join(dir, "b"), filepath.Join(dir, "c")}, options)
			require.NoError(t, err)
			return r
		})
	})
}
