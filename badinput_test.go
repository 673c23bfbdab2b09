package ota_test

import (
	"bytes"
	"context"
	"io"
	"os"
	"testing"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/bootrecord"
	"github.com/slotota/ota/bundle"
	"github.com/slotota/ota/flash/memflash"
	"github.com/stretchr/testify/require"
)

// bundleDevice takes the parts of the bundles recorded from the genuine tool.
func bundleDevice(t *testing.T) (*ota.Device, *memflash.Chip) {
	part := memflash.Config{Size: 4 << 10}
	chip := memflash.NewChip(part, part, part, part, part, part, part)
	f := chip.Flashes()
	record, err := bootrecord.New(f[4:], &bootrecord.Options{
		Running: func(context.Context) (ota.SlotID, error) { return 0, nil },
	})
	require.NoError(t, err)
	dev, err := ota.Open(t.Context(), record, []ota.Slot{
		{Parts: []ota.Part{{Name: "app", Flash: f[0]}, {Name: "fs", Flash: f[1]}}},
		{Parts: []ota.Part{{Name: "app", Flash: f[2]}, {Name: "fs", Flash: f[3]}}},
	}, &ota.Options{Platform: "esp32", Product: "demo"})
	require.NoError(t, err)
	return dev, chip
}

func installBundle(t *testing.T, dev *ota.Device, r io.Reader) error {
	img, err := (&bundle.Policy{AllowUnsigned: true}).Open(t.Context(), r)
	if err != nil {
		return err
	}
	_, err = dev.Update(t.Context(), img, nil)
	return err
}

// A damaged bundle is never selected: cut off at any byte, or with any byte
// changed that means something.
func TestDamagedBundles(t *testing.T) {
	small, err := os.ReadFile("bundle/testdata/small.zip")
	require.NoError(t, err)
	dev, chip := bundleDevice(t)
	require.NoError(t, installBundle(t, dev, bytes.NewReader(small)))
	require.NoError(t, dev.Revert(t.Context()))
	factory := [2][]byte{make([]byte, 4<<10), make([]byte, 4<<10)}

	untouched := func(n int, what string) {
		t.Helper()
		s, err := dev.BootState(t.Context())
		require.NoError(t, err)
		require.Equal(t, `{"active_slot":0,"is_committed":true,"revert_slot":-1,"commit_timeout":0}`, stateJSON(t, s), "%s %d", what, n)
		require.Empty(t, dev.Status().Busy)
		for i := range factory {
			got := make([]byte, len(factory[i]))
			require.NoError(t, chip.Peek(i, got, 0))
			require.Equal(t, factory[i], got)
		}
	}
	for n := range small {
		err := installBundle(t, dev, bytes.NewReader(small[:n]))
		var e *bundle.Error
		require.ErrorAs(t, err, &e, "cut at %d", n)
		untouched(n, "cut at")
	}
	accepted := 0
	for n := range small {
		for _, x := range []byte{0x01, 0x80, 0xff} {
			bad := bytes.Clone(small)
			bad[n] ^= x
			if err := installBundle(t, dev, bytes.NewReader(bad)); err == nil {
				// Times and the like mean nothing; what is installed is the same.
				accepted++
				for i, want := range [][]byte{small[0x311+37 : 0x311+37+1500], []byte("hello fs image")} {
					got := make([]byte, len(want))
					require.NoError(t, chip.Peek(2+i, got, 0))
					require.Equal(t, want, got, "byte %d", n)
				}
				require.NoError(t, dev.Revert(t.Context()))
			}
			untouched(n, "changed")
		}
	}
	t.Logf("%d of %d changes accepted", accepted, 3*len(small))
	require.NoError(t, installBundle(t, dev, bytes.NewReader(small)))
}
