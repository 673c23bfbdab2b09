package fileflash

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"

	"github.com/slotota/ota"
	"github.com/stretchr/testify/require"
)

var _ ota.Flash = (*File)(nil)

// image makes a regular file of n bytes, each the low byte of its offset.
func image(t *testing.T, n int) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "slot.img")
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i)
	}
	require.NoError(t, os.WriteFile(path, b, 0o600))
	return path
}

func openT(t *testing.T, path string, o *Options) *File {
	t.Helper()
	f, err := Open(path, o)
	require.NoError(t, err)
	t.Cleanup(func() { f.Close() })
	return f
}

func TestReadWrite(t *testing.T) {
	path := image(t, 1000)
	f := openT(t, path, nil)
	require.EqualValues(t, 1000, f.Size())
	require.False(t, f.ReadOnly())

	n, err := f.WriteAt([]byte("hello"), 995)
	require.NoError(t, err)
	require.Equal(t, 5, n)
	require.NoError(t, f.Sync())

	buf := make([]byte, 10)
	n, err = f.ReadAt(buf, 990)
	require.NoError(t, err)
	require.Equal(t, 10, n)
	require.Equal(t, "\xde\xdf\xe0\xe1\xe2hello", string(buf))

	n, err = f.ReadAt(buf, 996)
	require.ErrorIs(t, err, io.EOF)
	require.Equal(t, "ello", string(buf[:n]))
	for _, off := range []int64{1000, 1001, 1 << 62} {
		n, err = f.ReadAt(buf, off)
		require.Equal(t, io.EOF, err)
		require.Zero(t, n)
	}
	_, err = f.ReadAt(buf, -1)
	require.ErrorIs(t, err, ota.ErrInvalid)

	require.NoError(t, f.Close())
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Len(t, b, 1000)
	require.Equal(t, "hello", string(b[995:]))

	_, err = f.ReadAt(buf, 0)
	require.ErrorIs(t, err, fs.ErrClosed)
	_, err = f.WriteAt(buf, 0)
	require.ErrorIs(t, err, fs.ErrClosed)
	require.ErrorIs(t, f.Sync(), fs.ErrClosed)
}

func TestNeverGrows(t *testing.T) {
	path := image(t, 100)
	before, err := os.ReadFile(path)
	require.NoError(t, err)
	f := openT(t, path, nil)
	for _, c := range []struct {
		off  int64
		n    int
		want error
	}{
		{100, 1, ota.ErrTooLarge},
		{99, 2, ota.ErrTooLarge},
		{0, 101, ota.ErrTooLarge},
		{1 << 62, 1, ota.ErrTooLarge},
		{1<<63 - 1, 1, ota.ErrTooLarge},
		{-1, 1, ota.ErrInvalid},
		{-1 << 63, 1, ota.ErrInvalid},
	} {
		n, err := f.WriteAt(bytes.Repeat([]byte{'x'}, c.n), c.off)
		require.ErrorIs(t, err, c.want, "%d bytes at %d", c.n, c.off)
		require.Zero(t, n)
	}
	n, err := f.WriteAt(nil, 100)
	require.NoError(t, err)
	require.Zero(t, n)
	after, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, before, after)
}

func TestShrunkFile(t *testing.T) {
	path := image(t, 100)
	f := openT(t, path, nil)
	require.NoError(t, os.Truncate(path, 50))
	n, err := f.ReadAt(make([]byte, 20), 40)
	require.ErrorIs(t, err, io.ErrUnexpectedEOF)
	require.NotErrorIs(t, err, io.EOF)
	require.Equal(t, 10, n)
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	path := image(t, 1000)
	empty := filepath.Join(dir, "empty")
	require.NoError(t, os.WriteFile(empty, nil, 0o600))
	for _, c := range []struct {
		name, path string
		o          *Options
		want       error
	}{
		{"missing", filepath.Join(dir, "none"), nil, fs.ErrNotExist},
		{"missing with size", filepath.Join(dir, "none"), &Options{Size: 10}, fs.ErrNotExist},
		{"missing folder", filepath.Join(dir, "none", "x"), &Options{Size: 10, Create: true}, fs.ErrNotExist},
		{"directory", dir, nil, ota.ErrInvalid},
		{"directory, create", dir, &Options{Size: 10, Create: true}, ota.ErrInvalid},
		{"empty", empty, nil, ota.ErrInvalid},
		{"shorter", path, &Options{Size: 1001}, ota.ErrInvalid},
		{"longer", path, &Options{Size: 999}, ota.ErrInvalid},
		{"longer, create", path, &Options{Size: 999, Create: true}, ota.ErrInvalid},
		{"negative size", path, &Options{Size: -1}, ota.ErrInvalid},
		{"create without size", path, &Options{Create: true}, ota.ErrInvalid},
		{"create read-only", path, &Options{Create: true, Size: 1000, ReadOnly: true}, ota.ErrInvalid},
		{"empty path", "", nil, fs.ErrNotExist},
		{"NUL in path", "a\x00b", nil, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			f, err := Open(c.path, c.o)
			require.Error(t, err)
			require.Nil(t, f)
			if c.want != nil {
				require.ErrorIs(t, err, c.want)
			}
		})
	}
	info, err := os.Stat(path)
	require.NoError(t, err)
	require.EqualValues(t, 1000, info.Size(), "a refused file was changed")
}

func TestSymlink(t *testing.T) {
	path := image(t, 1000)
	link := filepath.Join(t.TempDir(), "by-name")
	if err := os.Symlink(path, link); err != nil {
		t.Skip("no symbolic links here:", err)
	}
	f := openT(t, link, nil)
	require.EqualValues(t, 1000, f.Size())

	toDir := filepath.Join(t.TempDir(), "dir")
	require.NoError(t, os.Symlink(t.TempDir(), toDir))
	_, err := Open(toDir, nil)
	require.ErrorIs(t, err, ota.ErrInvalid)
}

func TestReadOnly(t *testing.T) {
	path := image(t, 1000)
	f := openT(t, path, &Options{ReadOnly: true, Size: 1000})
	require.True(t, f.ReadOnly())
	_, err := f.WriteAt([]byte{1}, 0)
	require.ErrorIs(t, err, ota.ErrReadOnly)
	require.NoError(t, f.Sync())
	b := make([]byte, 2)
	_, err = f.ReadAt(b, 7)
	require.NoError(t, err)
	require.Equal(t, []byte{7, 8}, b)

	// A reader is in nobody's way.
	openT(t, path, nil)
	openT(t, path, &Options{ReadOnly: true})
}

func TestSecondWriter(t *testing.T) {
	if runtime.GOOS == "windows" || runtime.GOOS == "plan9" {
		t.Skip("no locks on", runtime.GOOS)
	}
	path := image(t, 1000)
	f := openT(t, path, nil)
	_, err := Open(path, nil)
	require.ErrorIs(t, err, ErrInUse)
	_, err = Open(path, &Options{ReadOnlyIfMounted: true})
	require.ErrorIs(t, err, ErrInUse, "locked is not mounted")
	require.NoError(t, f.Close())
	openT(t, path, nil)
}

func TestCreate(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "slot")
	// What an earlier attempt has left behind does no harm.
	require.NoError(t, os.WriteFile(path+".new", []byte("torn"), 0o600))
	o := &Options{Size: 100_000, Create: true, Perm: 0o640}
	f := openT(t, path, o)
	require.EqualValues(t, 100_000, f.Size())
	b := make([]byte, 100_000)
	_, err := f.ReadAt(b, 0)
	require.NoError(t, err)
	require.Equal(t, make([]byte, 100_000), b)
	_, err = f.WriteAt([]byte("kept"), 0)
	require.NoError(t, err)
	require.NoError(t, f.Close())

	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, entries, 1)
	if runtime.GOOS != "windows" {
		info, err := os.Stat(path)
		require.NoError(t, err)
		require.Zero(t, info.Mode().Perm()&^0o640)
		require.NotZero(t, info.Mode().Perm()&0o600)
	}

	f = openT(t, path, o)
	_, err = f.ReadAt(b[:4], 0)
	require.NoError(t, err)
	require.Equal(t, "kept", string(b[:4]))
}

func TestCreateTooLarge(t *testing.T) {
	dir := t.TempDir()
	_, err := Open(filepath.Join(dir, "slot"), &Options{Size: 1<<63 - 1, Create: true})
	require.Error(t, err)
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, entries)
}

func TestCreateMeetsAnother(t *testing.T) {
	path := image(t, 64)
	require.NoError(t, create(path, &Options{Size: 10}))
	info, err := os.Stat(path)
	require.NoError(t, err)
	require.EqualValues(t, 64, info.Size(), "replaced a file that appeared meanwhile")
	_, err = os.Stat(path + ".new")
	require.ErrorIs(t, err, fs.ErrNotExist)
}

func TestReplacedWhileOpening(t *testing.T) {
	a, b := image(t, 10), image(t, 10)
	info, err := os.Stat(a)
	require.NoError(t, err)
	f, err := os.Open(b)
	require.NoError(t, err)
	defer f.Close()
	_, err = examine(f, info, false, true, 0)
	require.ErrorIs(t, err, ErrInUse)
}

func TestSectors(t *testing.T) {
	for n, ok := range map[int]bool{512: true, 1024: true, 511: false, 513: false} {
		path := image(t, n)
		info, err := os.Stat(path)
		require.NoError(t, err)
		f, err := os.Open(path)
		require.NoError(t, err)
		_, err = examine(f, info, true, true, 0)
		if ok {
			require.NoError(t, err)
		} else {
			require.ErrorIs(t, err, ota.ErrInvalid)
		}
		require.NoError(t, f.Close())
	}
}

func TestFailedSyncStays(t *testing.T) {
	path := image(t, 100)
	f := openT(t, path, nil)
	broken := errors.New("input/output error")
	real := f.sync
	f.sync = func() error { return broken }
	require.ErrorIs(t, f.Sync(), broken)
	f.sync = real // the kernel would report success now
	require.ErrorIs(t, f.Sync(), broken)
	n, err := f.WriteAt([]byte{1}, 0)
	require.ErrorIs(t, err, broken)
	require.Zero(t, n)
	_, err = f.ReadAt(make([]byte, 1), 0)
	require.NoError(t, err, "reading goes on")
	require.NoError(t, f.Close())

	f = openT(t, path, nil)
	require.NoError(t, f.Sync())
	_, err = f.WriteAt([]byte{1}, 0)
	require.NoError(t, err)
}

// A sync during which another one fails must not report success: the kernel
// tells an error once.
func TestSyncBesideFailedSync(t *testing.T) {
	f := openT(t, image(t, 100), nil)
	broken := errors.New("input/output error")
	inside, finish := make(chan struct{}), make(chan struct{})
	f.sync = func() error { close(inside); <-finish; return nil }
	result := make(chan error)
	go func() { result <- f.Sync() }()
	<-inside
	f.sync = func() error { return broken }
	require.ErrorIs(t, f.Sync(), broken)
	close(finish)
	require.ErrorIs(t, <-result, broken)
}

func TestConcurrent(t *testing.T) {
	f := openT(t, image(t, 64<<10), nil)
	var wg sync.WaitGroup
	for i := range int64(8) {
		wg.Go(func() {
			for j := range int64(50) {
				off := i*8<<10 + j*100
				p := bytes.Repeat([]byte{byte(i<<4 + j&15)}, 100)
				if _, err := f.WriteAt(p, off); err != nil {
					t.Error(err)
				}
				q := make([]byte, 100)
				if _, err := f.ReadAt(q, off); err != nil || !bytes.Equal(p, q) {
					t.Errorf("read back at %d: %v", off, err)
				}
			}
			if err := f.Sync(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}
