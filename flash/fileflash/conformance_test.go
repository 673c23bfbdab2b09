package fileflash_test

import (
	"path/filepath"
	"testing"

	"github.com/slotota/ota"
	"github.com/slotota/ota/flash/fileflash"
	"github.com/slotota/ota/flashtest"
	"github.com/stretchr/testify/require"
)

func TestConformance(t *testing.T) {
	for _, size := range []int64{8, 4096, 100_003, 1 << 20} {
		f, err := fileflash.Open(filepath.Join(t.TempDir(), "slot.img"), &fileflash.Options{Size: size, Create: true})
		require.NoError(t, err)
		require.NoError(t, flashtest.Test(f), "%d bytes", size)
		if size > 1000 {
			r, err := ota.Region(f, 500, size-1000)
			require.NoError(t, err)
			require.NoError(t, flashtest.Test(r), "a region of %d bytes", size)
		}
		require.NoError(t, f.Close())
	}
}
