package memflash_test

import (
	"testing"

	"github.com/slotota/ota"
	"github.com/slotota/ota/crashtest"
	"github.com/slotota/ota/flash/memflash"
	"github.com/slotota/ota/flashtest"
	"github.com/stretchr/testify/require"
)

func TestConformance(t *testing.T) {
	for _, g := range crashtest.Geometries() {
		t.Run(g.Name, func(t *testing.T) {
			cfg := g.Config(600 << 10)
			f := memflash.New(cfg)
			require.NoError(t, flashtest.Test(f))

			// Regions of it are as good: all but the first erase unit, or 1 KiB.
			_, n := ota.EraseUnit(f, 0)
			n = max(n, 1<<10)
			r, err := ota.Region(f, n, f.Size()-n)
			require.NoError(t, err)
			require.NoError(t, flashtest.Test(r))
		})
	}
	require.NoError(t, flashtest.Test(memflash.New(memflash.Config{Size: 1 << 16, EraseSize: 1 << 12, Rewrite: true})))
}
