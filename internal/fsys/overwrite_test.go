package fsys

import (
	"bytes"
	"io/fs"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestOverwriteSector(t *testing.T) {
	var b [Sector]byte
	copy(b[:], "new")
	for name, f := range map[string]Overwriter{"os": OS{t.TempDir()}, "sim": mount(t, chip(), true)} {
		t.Run(name, func(t *testing.T) {
			require.ErrorIs(t, f.OverwriteSector("/a", &b), fs.ErrNotExist)
			require.NoError(t, f.WriteFile("/a", bytes.Repeat([]byte("x"), Sector-1)))
			require.Error(t, f.OverwriteSector("/a", &b), "too small")
			require.NoError(t, f.WriteFile("/a", bytes.Repeat([]byte("x"), Sector+3)))
			require.NoError(t, f.OverwriteSector("/a", &b))
			got, err := f.ReadFile("/a")
			require.NoError(t, err)
			require.Equal(t, append(b[:], "xxx"...), got)
		})
	}
}
