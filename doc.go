// Package ota updates the firmware of devices that have two or more places for
// it, so that no power cut, no bad image and no lost connection leaves them
// without one that boots.
//
// # The model
//
// A device has slots, numbered from 0. A [Slot] holds one complete firmware in
// one or more named parts; each [Part] lies on a [Flash]. A [Bootloader] keeps
// the [BootState] that decides which slot the next boot starts, and knows which
// one is running. [Open] puts them together to a [Device]:
//
//	dev, err := ota.Open(ctx, bootloader, []ota.Slot{
//		{Parts: []ota.Part{{Name: "app", Flash: app0}, {Name: "fs", Flash: fs0}}},
//		{Parts: []ota.Part{{Name: "app", Flash: app1}, {Name: "fs", Flash: fs1}}},
//	}, &ota.Options{Platform: "acme-gw2", Reset: reboot})
//
// [Device.Update] streams an [Image] into a slot that is neither running nor
// selected, verifies it by reading it back, and makes the state dirty: the new
// slot is active, the running one is the revert slot. After [Device.Reboot] the
// new firmware is on trial. It must be committed within its commit timeout, by
// [Device.Commit] or, once its health checks have passed, by [Device.Watch].
// Otherwise, and after any reset that comes before the commit, the device goes
// back to the firmware that worked:
//
//	          Update, Reboot                Commit
//	committed ──────────────▶ dirty (trial) ──────▶ committed
//	    ▲                          │
//	    └──────────────────────────┘
//	     Revert, timeout, failed check, reset
//
// A program that is updated this way calls Watch when it starts, and leaves it
// running:
//
//	go dev.Watch(ctx) // commits or goes back, if this is a trial
//
// Package bundle makes an Image of a firmware file, package rpcjson serves the
// operations over the network and serial lines, package boot/bootrecord is a
// Bootloader for devices whose boot stage calls [Boot].
//
// # Guarantees
//
//   - Before anything is erased the boot state has durably ceased to point to
//     the slot, and the image has been authenticated and found to fit.
//   - The running slot, and the revert slot of a trial, are never written.
//   - Every byte is hashed as it leaves for the flash, and again as it is read
//     back. Only then does the boot state change; the change is read back, too.
//   - An uncommitted firmware gets one boot (more only with Options.Tries), and
//     [Boot] counts it durably before the firmware runs.
//   - A commit is for the running firmware. Commit and timeout cannot both win.
//   - A firmware below the security floor is refused. Committing raises the
//     floor in the same store that commits.
//   - Operations exclude each other; the state can be read at any time.
//   - After a failed update the boot state selects what it selected before.
//
// # Limits
//
//   - What the running firmware writes to must be a [Part] with Mutable set; it
//     is then not verified at boot.
//   - Without [Boot] the boot loader of the device decides what happens to a
//     firmware that does not come up; see the Bootloader in use.
//   - A firmware that hangs is caught by the reset that a watchdog causes. The
//     commit timeout is kept by the new firmware itself, in Watch.
//   - If all copies of the boot state are lost, the security floor is lost too.
//     Which firmware was promised cannot be known then; the slots are tried in
//     turn until one is committed.
//   - On media without erase units, bytes behind the image stay as they were.
//     They are not part of the firmware.
package ota
