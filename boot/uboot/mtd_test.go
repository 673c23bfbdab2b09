package uboot

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/flash/memflash"
	"github.com/slotota/ota/flash/mtdflash"
	"github.com/slotota/ota/flash/ubiflash"
)

// What a line of fw_env.config means for an MTD device.
func TestMTDOptions(t *testing.T) {
	for _, tc := range []struct {
		l    Location
		want mtdflash.Options
	}{
		{Location{Size: 0x2000}, mtdflash.Options{Length: 0x2000, Size: 0x2000}},
		{Location{Offset: 0x40000, Size: 0x2000, SectorSize: 0x10000}, mtdflash.Options{Offset: 0x40000, Length: 0x10000, Size: 0x2000}},
		{Location{Size: 0x20000, SectorSize: 0x10000}, mtdflash.Options{Length: 0x20000, Size: 0x20000}},
		{Location{Size: 0x20000, SectorSize: 0x20000, Sectors: 4}, mtdflash.Options{Length: 0x80000, Size: 0x20000}},
		{Location{Size: 0x20000, SectorSize: 0x10000, Sectors: 1}, mtdflash.Options{Length: 0x20000, Size: 0x20000}},
	} {
		require.Equal(t, tc.want, *mtdOptions(tc.l))
	}
	require.Equal(t, Boolean, mtdFlags(mtdflash.NOR))
	require.Equal(t, Boolean, mtdFlags(mtdflash.DataFlash))
	require.Equal(t, Incremental, mtdFlags(mtdflash.NAND))
}

func TestOpenDevice(t *testing.T) {
	_, _, err := OpenDevice(Location{Path: "/dev/ubi0_0", Offset: 1, Size: 100})
	require.ErrorIs(t, err, ota.ErrInvalid)
	v, flags, err := OpenDevice(Location{Path: filepath.Join(t.TempDir(), "ubi0_0"), Size: 100})
	require.NoError(t, err)
	require.Equal(t, Incremental, flags)
	require.EqualValues(t, 100, v.Size())
	_, err = v.ReadAt(make([]byte, 1), 0)
	require.Error(t, err)
	_, err = v.WriteAt(make([]byte, 99), 0)
	require.ErrorIs(t, err, ota.ErrInvalid)
	_, _, err = OpenDevice(Location{Path: filepath.Join(t.TempDir(), "mtd0"), Size: 100})
	require.Error(t, err)
}

// interrupted is a volume until it is written.
type interrupted struct {
	ota.Flash
	written bool
}

func (f *interrupted) ReadAt(p []byte, off int64) (int, error) {
	if !f.written {
		return readCopy(unreadable{f.Flash}, p, off)
	}
	return f.Flash.ReadAt(p, off)
}

func (f *interrupted) WriteAt(p []byte, off int64) (int, error) {
	f.written = true
	return f.Flash.WriteAt(p, off)
}

type unreadable struct{ ota.Flash }

func (unreadable) ReadAt([]byte, int64) (int, error) { return 0, ubiflash.ErrInterrupted }

// A power cut during the update of a volume costs one copy, which is written anew.
func TestInterruptedVolume(t *testing.T) {
	const size = 512
	good := memflash.New(memflash.Config{Size: size})
	raw := make([]byte, size)
	require.NoError(t, format(raw[5:], Vars{{"a", "1"}}))
	binary.LittleEndian.PutUint32(raw, crc32.ChecksumIEEE(raw[5:]))
	raw[4] = 7
	_, err := good.WriteAt(raw, 0)
	require.NoError(t, err)
	bad := &interrupted{Flash: memflash.New(memflash.Config{Size: size})}
	e, err := NewEnv([]ota.Flash{bad, good}, nil)
	require.NoError(t, err)
	require.NoError(t, e.Write(t.Context(), Set("b", "2")))
	require.True(t, bad.written)
	v, err := e.Read(t.Context())
	require.NoError(t, err)
	require.Equal(t, Vars{{"a", "1"}, {"b", "2"}}, v)
}

// torn is NAND with pages that read with uncorrectable errors until they are erased.
type torn struct {
	ota.Flash
	bad map[int64]bool
}

const tornPage = 512

func (f *torn) WriteSize() int64 { return tornPage }

func (f *torn) EraseSize() int64 { return f.Size() }

func (f *torn) Erase(off, n int64) error {
	clear(f.bad)
	_, err := f.WriteAt(bytes.Repeat([]byte{0xff}, int(n)), off)
	return err
}

func (f *torn) ReadAt(p []byte, off int64) (int, error) {
	for at := off - off%tornPage; at < off+int64(len(p)); at += tornPage {
		if f.bad[at] {
			return 0, fmt.Errorf("page at %d: %w", at, mtdflash.ErrECC)
		}
	}
	return f.Flash.ReadAt(p, off)
}

// A power cut while a copy on NAND is erased or written leaves pages that cannot be
// read until the block is erased again. It costs that copy, and nothing else.
func TestTornNAND(t *testing.T) {
	const size, blockSize = 2 * tornPage, 4 * tornPage
	image := func(flag byte, vars Vars) []byte {
		raw := make([]byte, size)
		require.NoError(t, format(raw[5:], vars))
		binary.LittleEndian.PutUint32(raw, crc32.ChecksumIEEE(raw[5:]))
		raw[4] = flag
		return append(raw, bytes.Repeat([]byte{'x'}, blockSize-size)...)
	}
	open := func() (*Env, [2]*torn) {
		var fs [2]*torn
		for i, b := range [][]byte{image(8, Vars{{"a", "2"}}), image(7, Vars{{"a", "1"}})} {
			fs[i] = &torn{memflash.New(memflash.Config{Size: blockSize}), map[int64]bool{}}
			_, err := fs[i].WriteAt(b, 0)
			require.NoError(t, err)
		}
		e, err := NewEnv([]ota.Flash{fs[0], fs[1]}, &EnvOptions{Size: size})
		require.NoError(t, err)
		return e, fs
	}
	for page := int64(0); page < blockSize; page += tornPage {
		for i, want := range []string{"1", "2"} {
			e, fs := open()
			fs[i].bad[page] = true
			v, err := e.Read(t.Context())
			require.NoError(t, err, "copy %d, page at %d", i, page)
			if page >= size {
				want = "2" // behind the copy
			}
			require.Equal(t, Vars{{"a", want}}, v)
			for range 2 { // both copies are written
				require.NoError(t, e.Write(t.Context(), Set("a", want+"0")))
				want += "0"
			}
			v, err = e.Read(t.Context())
			require.NoError(t, err)
			require.Equal(t, Vars{{"a", want}}, v)
			require.Empty(t, fs[i].bad)
			// What follows is kept, but for what cannot be read.
			for at := int64(size); at < blockSize; at += tornPage {
				b := make([]byte, tornPage)
				_, err := fs[i].ReadAt(b, at)
				require.NoError(t, err)
				c := byte('x')
				if at == page {
					c = 0xff
				}
				require.Equal(t, bytes.Repeat([]byte{c}, tornPage), b)
			}
		}
	}
	// With no copy left nothing is written.
	e, fs := open()
	fs[0].bad[0], fs[1].bad[0] = true, true
	_, err := e.Read(t.Context())
	require.ErrorIs(t, err, ErrNoEnvironment)
	require.ErrorIs(t, err, mtdflash.ErrECC)
	require.ErrorIs(t, e.Write(t.Context(), Set("a", "3")), ErrNoEnvironment)
}

// A path with a colon is a volume of UBI only if there is no such file: names in
// /dev/disk/by-path have colons.
func TestPathWithColon(t *testing.T) {
	dir := t.TempDir()
	name, config := filepath.Join(dir, "pci-0000:00:1f.2"), filepath.Join(dir, "fw_env.config")
	require.NoError(t, os.WriteFile(name, make([]byte, 512), 0o600))
	var opened []string
	c := &Config{File: config, OpenFlash: func(l Location) (ota.Flash, Flags, error) {
		opened = append(opened, filepath.Base(l.Path))
		return memflash.New(memflash.Config{Size: 512}), Incremental, nil
	}}
	require.NoError(t, os.WriteFile(config, []byte(name+" 0 512\n"+filepath.Join(dir, "ubi0:env")+" 0 512\n"), 0o600))
	e, err := Open(c)
	require.NoError(t, err)
	require.True(t, e.Redundant())
	require.Equal(t, []string{"ubi0:env"}, opened)
}
