package ota_test

import (
	"context"
	"crypto/ecdsa"
	"io"
	"time"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/bootrecord"
	"github.com/slotota/ota/bundle"
	"github.com/slotota/ota/flash/fileflash"
)

// The program in the README: two partitions, the boot record in files.
func Example_daemon() {
	var (
		ctx         context.Context
		key         *ecdsa.PublicKey
		body        io.Reader
		runningSlot func(context.Context) (ota.SlotID, error)
		reachCloud  func(context.Context) error
		reboot      func(context.Context) error
	)
	update := func() error {
		record, err := bootrecord.Files( // three copies of the boot record
			[]string{"/data/ota/0", "/data/ota/1", "/data/ota/2"}, &bootrecord.Options{Running: runningSlot})
		if err != nil {
			return err
		}
		a, err := fileflash.Open("/dev/mmcblk0p2", &fileflash.Options{ReadOnlyIfMounted: true}) // two slots
		if err != nil {
			return err
		}
		b, err := fileflash.Open("/dev/mmcblk0p3", &fileflash.Options{ReadOnlyIfMounted: true})
		if err != nil {
			return err
		}
		dev, err := ota.Open(ctx, record, []ota.Slot{
			{Parts: []ota.Part{{Name: "rootfs", Flash: a}}},
			{Parts: []ota.Part{{Name: "rootfs", Flash: b}}},
		}, &ota.Options{Platform: "acme-gw2", Checks: []ota.Check{{Name: "cloud", Run: reachCloud}}, Reset: reboot})
		if err != nil {
			return err
		}
		go dev.Watch(ctx) // on trial: checks, then commits or goes back

		policy := &bundle.Policy{Keys: []*ecdsa.PublicKey{key}} // who may sign
		img, err := policy.Open(ctx, body)                      // signature verified, nothing erased yet
		if err != nil {
			return err
		}
		if _, err = dev.Update(ctx, img, &ota.UpdateOptions{CommitTimeout: 5 * time.Minute}); err != nil {
			return err
		}
		return dev.Reboot(ctx)
	}
	_ = update
}
