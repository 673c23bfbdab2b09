package trust

import (
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
)

// Both firmwares of a device, the old and the new, get along with the file.
func TestLoadSave(t *testing.T) {
	m := newTeam(t)
	a := m.open(t)
	name := filepath.Join(t.TempDir(), "trust")
	b, err := Load(name, a.Bytes())
	require.NoError(t, err)
	require.Equal(t, a.Bytes(), b.Bytes(), "there is no file yet")

	two := signRecord(t, m.next(), m.root...)
	b, err = a.Update(two)
	require.NoError(t, err)
	require.NoError(t, b.Save(name))
	require.NoError(t, os.WriteFile(name+".new", []byte("of a save that was cut off"), 0o600))
	require.NoError(t, b.Save(name), "again")
	entries, err := os.ReadDir(filepath.Dir(name))
	require.NoError(t, err)
	require.Len(t, entries, 1)
	if runtime.GOOS != "windows" {
		info, err := os.Stat(name)
		require.NoError(t, err)
		require.Zero(t, info.Mode().Perm()&0o022, "others must not write it")
	}
	c, err := Load(name, a.Bytes())
	require.NoError(t, err)
	require.Equal(t, uint64(2), c.Record().Version)

	third := m.next()
	third.Version = 3
	newer, err := b.Update(signRecord(t, third, m.root...))
	require.NoError(t, err)
	c, err = Load(name, newer.Bytes())
	require.NoError(t, err, "a firmware with a newer chain than the file")
	require.Equal(t, uint64(3), c.Record().Version)
	require.NoError(t, c.Save(name))
	c, err = Load(name, a.Bytes())
	require.NoError(t, err, "and back to the old firmware")
	require.Equal(t, uint64(3), c.Record().Version)
}

// Neither damage nor somebody else's record brings in other keys, or old ones.
func TestLoadRefuses(t *testing.T) {
	m, mallory := newTeam(t), newTeam(t)
	a := m.open(t)
	b, err := a.Update(signRecord(t, m.next(), m.root[:2]...))
	require.NoError(t, err)
	name := filepath.Join(t.TempDir(), "trust")
	good := b.Bytes()
	load := func(content []byte) error {
		require.NoError(t, os.WriteFile(name, content, 0o600))
		_, err := Load(name, a.Bytes())
		return err
	}
	require.NoError(t, load(good))
	for i := range good {
		c := slices.Clone(good)
		c[i] ^= 4
		got, err := a.Update(c) // what Load does with the file
		if err != nil {
			requireTyped(t, err, "byte %d", i)
			continue
		}
		// A signature of the first record, which is built in, may be anything.
		require.Equal(t, string(good), string(got.Bytes()), "byte %d", i)
	}
	require.ErrorIs(t, load(append(slices.Clone(good), 'x')), ErrFormat)
	require.ErrorIs(t, load(mallory.open(t).Bytes()), ErrFork)
	require.ErrorIs(t, load(signRecord(t, mallory.next(), mallory.root...)), ErrUnsigned)
	require.ErrorIs(t, load(nil), ErrFormat)
	require.ErrorIs(t, load(make([]byte, MaxChain+10)), ErrTooLarge)
	require.NoError(t, load(a.Bytes()), "an older chain is no damage")

	require.NoError(t, os.Remove(name))
	require.NoError(t, os.Mkdir(name, 0o700))
	_, err = Load(name, a.Bytes())
	require.ErrorContains(t, err, "not a regular file")
	_, err = Load(name, nil)
	require.ErrorIs(t, err, ErrFormat)
	require.Error(t, b.Save(name), "a directory is in the way")
	require.Error(t, b.Save(filepath.Join(name, "no", "directory")))
}
