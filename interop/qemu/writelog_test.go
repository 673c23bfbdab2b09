package qemu_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/bootrecord"
	"github.com/slotota/ota/boot/driver"
	"github.com/slotota/ota/boot/uboot"
)

// TestWriteLog records what U-Boot and the guest write to the disk while a trial
// begins, is committed, and another update selects its slot. A power cut may come
// after each sector, and lose any one of those that were not flushed: the state is
// the one before or the one after, and no variable of the board is lost.
func TestWriteLog(t *testing.T) {
	needs(t, true, ubootTools)
	b := newUBoot(t)
	v2 := b.bundle(b.image("v2", "", nil))
	v1 := b.bundle(b.v1)
	m := b.power("")
	m.ready(0, "v1")
	m.do("update %s 36000", v2)
	m.off()

	// Environment and records, with the table before them.
	disk := make([]byte, 3*mib)
	f, err := os.Open(b.disk)
	require.NoError(t, err)
	_, err = io.ReadFull(f, disk)
	f.Close()
	require.NoError(t, err)

	log := b.path("writes.log")
	require.NoError(t, os.WriteFile(log, make([]byte, mib), 0o600))
	m = b.power(log)
	m.ready(1, "v2")
	m.do("commit")
	r := m.do("update %s 36000", v1)
	require.Equal(t, 0, r.Active)
	m.off()

	writes := readLog(t, b.read(log))
	states := replayLog(t, disk, writes)
	require.Equal(t, []string{
		"slot 1 on trial, 1 tries", "slot 1 on trial, 0 tries", "slot 1 committed", "slot 0 on trial, 1 tries",
	}, states)
}

// write is an entry of a log of writes.
type write struct {
	off   int64 // bytes
	flush bool  // all before it are on the medium
	data  []byte
}

// readLog reads a log of QEMU's driver blklogwrites, which is that of dm-log-writes
// (torvalds/linux, Documentation/admin-guide/device-mapper/log-writes.rst).
func readLog(t *testing.T, b []byte) (ws []write) {
	t.Helper()
	const (
		magic   = 0x6a736677736872
		flush   = 1
		fua     = 2
		discard = 4
	)
	le := binary.LittleEndian
	require.Equal(t, uint64(magic), le.Uint64(b))
	n, sector := le.Uint64(b[16:]), int64(le.Uint32(b[24:]))
	b = b[sector:]
	for range n {
		off, sectors, flags := le.Uint64(b), le.Uint64(b[8:]), le.Uint64(b[16:])
		b = b[sector:]
		w := write{off: int64(off) * sector, flush: flags&flush != 0}
		require.Zero(t, flags&(fua|discard), "not expected here")
		w.data = b[:int64(sectors)*sector]
		b = b[len(w.data):]
		ws = append(ws, w)
	}
	return ws
}

// sector is a sector that was written.
type sector struct {
	off  int64
	data []byte
}

// replayLog checks the disk after each power cut and returns the states that it went
// through.
func replayLog(t *testing.T, disk []byte, ws []write) (states []string) {
	t.Helper()
	loader := openDisk(t, disk)
	// with returns the state when these sectors were written, and no others.
	with := func(ss ...sector) ota.BootState {
		undo := make([]sector, len(ss))
		for i, s := range ss {
			undo[i] = sector{s.off, bytes.Clone(disk[s.off:][:sectorSize])}
			copy(disk[s.off:], s.data)
		}
		s, err := loader.Load(t.Context())
		require.NoError(t, err)
		for _, s := range slices.Backward(undo) {
			copy(disk[s.off:], s.data)
		}
		return s
	}
	note := func(s ota.BootState) {
		d := fmt.Sprintf("slot %v committed", s.Active)
		if !s.Committed {
			d = fmt.Sprintf("slot %v on trial, %d tries", s.Active, s.Tries)
		}
		if len(states) == 0 || states[len(states)-1] != d {
			states = append(states, d)
		}
	}
	var pending []sector // since the last flush
	before := with()
	note(before)
	flushes, crashes := 0, 0
	flush := func() {
		after := with(pending...)
		for n := range len(pending) + 1 {
			for lost := range n + 1 { // n: none
				left := slices.Concat(pending[:lost], pending[min(lost+1, n):n])
				got := with(left...)
				require.True(t, got.Equal(before) || got.Equal(after), "%d of %d sectors, without number %d: %+v\nbefore %+v\nafter %+v",
					n, len(pending), lost, got, before, after)
				crashes++
			}
		}
		for _, s := range pending {
			copy(disk[s.off:], s.data)
		}
		note(after)
		before, pending = after, nil
		flushes++
	}
	for _, w := range ws {
		if w.flush && len(pending) > 0 {
			flush()
		}
		for i := int64(0); i < int64(len(w.data)); i += sectorSize {
			if off := w.off + i; off < int64(len(disk)) {
				pending = append(pending, sector{off, w.data[i:][:sectorSize]})
			}
		}
	}
	flush()
	t.Logf("%d entries, %d flushes that matter, %d power cuts", len(ws), flushes, crashes)
	return states
}

// openDisk returns the boot loader whose environment and records are in disk.
func openDisk(t *testing.T, disk []byte) ota.Bootloader {
	t.Helper()
	region := func(off, n int64) ota.Flash { return &memory{disk[off:][:n]} }
	env, err := uboot.NewEnv([]ota.Flash{region(envCopy0, envSize), region(envCopy1, envSize)}, nil)
	require.NoError(t, err)
	d, err := uboot.NewDriver(env, &uboot.DriverConfig{Names: []string{"A", "B"}})
	require.NoError(t, err)
	var records []ota.Bootloader
	for i := range int64(2) {
		places, err := bootrecord.Split(region(2*mib+i*mib/2, mib/2), 3)
		require.NoError(t, err)
		r, err := bootrecord.New(places, nil)
		require.NoError(t, err)
		records = append(records, r)
	}
	loader, err := driver.New(&boardDriver{d, env}, records[0], records[1])
	require.NoError(t, err)
	return loader
}

// boardDriver makes sure that the board's variables are there, too.
type boardDriver struct {
	*uboot.Driver
	env *uboot.Env
}

func (d *boardDriver) Read(ctx context.Context) (driver.Choice, error) {
	vars, err := d.env.Read(ctx)
	if err != nil {
		return driver.Choice{}, err
	}
	if v, _ := vars.Get("board"); v != "serial 42" {
		return driver.Choice{}, fmt.Errorf("variable board is %q", v)
	}
	return d.Driver.Read(ctx)
}

// memory is a Flash that is only read.
type memory struct{ b []byte }

func (m *memory) Size() int64 { return int64(len(m.b)) }
func (m *memory) Sync() error { return nil }
func (m *memory) ReadAt(p []byte, off int64) (int, error) {
	return bytes.NewReader(m.b).ReadAt(p, off)
}
func (m *memory) WriteAt([]byte, int64) (int, error) { return 0, errors.New("read-only") }
