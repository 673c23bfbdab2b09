package ota_test

import (
	"context"
	"fmt"
	"time"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/bootrecord"
	"github.com/slotota/ota/flash/memflash"
	"github.com/slotota/ota/internal/sim"
)

// Two slots and three copies of the boot record, in memory.
func Example() {
	ctx := context.Background()
	region := func() ota.Flash { return memflash.New(memflash.Config{Size: 64 << 10, EraseSize: 4 << 10}) }
	running := ota.SlotID(0)
	record, _ := bootrecord.New([]ota.Flash{region(), region(), region()}, &bootrecord.Options{
		Running: func(context.Context) (ota.SlotID, error) { return running, nil },
	})
	slots := []ota.Slot{
		{Parts: []ota.Part{{Name: "app", Flash: region()}, {Name: "fs", Flash: region()}}},
		{Parts: []ota.Part{{Name: "app", Flash: region()}, {Name: "fs", Flash: region()}}},
	}
	dev, _ := ota.Open(ctx, record, slots, &ota.Options{Platform: "sim"})

	// Install an image; it will have five minutes to be committed.
	img := &sim.Image{V: 2} // in real life from bundle.Policy.Open
	res, err := dev.Update(ctx, img, &ota.UpdateOptions{CommitTimeout: 5 * time.Minute})
	fmt.Println("installed in slot", res.Slot, err)

	// The boot stage decides, and the new firmware starts.
	next, _ := ota.Boot(ctx, record, slots, nil)
	running = next.Slot
	dev, _ = ota.Open(ctx, record, slots, &ota.Options{Platform: "sim", BootClock: justBooted})
	fmt.Println("running slot", dev.Running(), "on trial:", dev.Status().Trial)

	// It works.
	fmt.Println("commit:", dev.Commit(ctx))
	state, _ := dev.BootState(ctx)
	fmt.Println("active slot", state.Active, "committed:", state.Committed)
	// Output:
	// installed in slot 1 <nil>
	// running slot 1 on trial: true
	// commit: <nil>
	// active slot 1 committed: true
}

func justBooted() (time.Duration, error) { return time.Second, nil }
