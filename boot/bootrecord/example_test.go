package bootrecord_test

import (
	"context"
	"errors"
	"fmt"
	"log"

	"github.com/slotota/ota"
	"github.com/slotota/ota/boot/bootrecord"
	"github.com/slotota/ota/flash/memflash"
)

// A record of three copies on NOR flash with erase units of 4 KiB.
func Example() {
	ctx := context.Background()
	flash := memflash.New(memflash.Config{Size: 64 << 10, EraseSize: 4 << 10})
	places, err := bootrecord.Split(flash, 3)
	if err != nil {
		log.Fatal(err)
	}
	r, err := bootrecord.New(places, &bootrecord.Options{
		Running: func(context.Context) (ota.SlotID, error) { return 0, nil },
	})
	if err != nil {
		log.Fatal(err)
	}
	_, err = r.Heal(ctx)
	fmt.Println(errors.Is(err, ota.ErrNoBootState))

	if err := r.Store(ctx, ota.BootState{Active: 1, Revert: 0, Tries: 1}); err != nil {
		log.Fatal(err)
	}
	if err := flash.(ota.Eraser).Erase(0, 4<<10); err != nil { // the first copy is lost
		log.Fatal(err)
	}
	s, err := r.Heal(ctx)
	fmt.Println(s.Active, s.Committed, err, r.Health().Good)
	// Output:
	// true
	// 1 false <nil> 3
}
