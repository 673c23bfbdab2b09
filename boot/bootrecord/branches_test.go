package bootrecord

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/slotota/ota"
	"github.com/slotota/ota/flash/memflash"
	"github.com/stretchr/testify/require"
)

// moody is a flash whose erase units are not always what they were.
type moody struct {
	ota.Flash
	ota.Eraser
	size *int64
}

func (f moody) EraseSize() int64 { return *f.size }

// A flash whose geometry changes later is not erased.
func TestGeometryChanges(t *testing.T) {
	chip := memflash.NewChip(memflash.Config{Size: 4 << 10, EraseSize: 4 << 10}, memflash.Config{Size: 4 << 10, EraseSize: 4 << 10})
	size := int64(4 << 10)
	var places []ota.Flash
	for _, f := range chip.Flashes() {
		places = append(places, moody{f, f.(ota.Eraser), &size})
	}
	r, err := New(places, nil)
	require.NoError(t, err)
	size = 0
	require.ErrorIs(t, r.Store(t.Context(), state(1)), ota.ErrInvalid)
	require.Zero(t, chip.Ops())
}

// stubbornFS does not let go of what an interrupted write left.
type stubbornFS struct {
	fileSystem
	err error
}

func (f stubbornFS) remove(string) error { return f.err }

func TestFilesCannotBeReplaced(t *testing.T) {
	dir := t.TempDir()
	paths := []string{filepath.Join(dir, "a"), filepath.Join(dir, "b")}
	stuck := errors.New("stuck")
	r, err := files(paths, nil, stubbornFS{osFiles{}, stuck})
	require.NoError(t, err)
	require.ErrorIs(t, r.Store(t.Context(), state(1)), stuck)
	_, err = r.Load(t.Context())
	require.ErrorIs(t, err, ota.ErrNoBootState)
	require.ErrorIs(t, osFiles{}.syncDir(filepath.Join(dir, "none")), fs.ErrNotExist)
}

// A relative path needs a directory that it is relative to.
func TestFilesWithoutDirectory(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("only Linux lets the working directory be removed and says so")
	}
	dir := filepath.Join(t.TempDir(), "gone")
	require.NoError(t, os.Mkdir(dir, 0o700))
	t.Chdir(dir)
	require.NoError(t, os.Remove(dir))
	_, err := Files([]string{"a", "b"}, nil)
	require.ErrorIs(t, err, fs.ErrNotExist)
}
