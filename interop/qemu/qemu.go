// Package qemu boots machines with real boot loaders in QEMU and updates them with
// the library. Folder guest holds what runs in them: one static program, /init,
// that embeds the library and does as it is told over the serial console. The tests
// build the disks, serve the bundles, pull the plug, and check with the loaders' own
// tools what is stored.
//
//	interop/qemu/setup                          packages and kernels, once
//	go test ./interop/qemu -qemu                U-Boot on arm64: about a minute
//	go test ./interop/qemu -qemu.long           all loaders, power cuts
//
// or scripts/qemu, which does both. Everything is emulated (TCG), so any machine
// will do.
package qemu

import (
	"encoding/json"
	"strings"
)

// Prefix begins the lines that the guest writes for the tests: Prefix, a word that
// says which kind of line it is, and a blank before the rest.
const Prefix = "OTA-"

// Kinds of lines.
const (
	Ready  = "READY" // the guest was started; a Report
	Phase  = "PHASE" // an operation has reached this phase; then the time since the boot
	Hang   = "HANG"  // the guest does nothing more
	Watch  = "WATCH" // the trial is over; the error of Watch, or "committed"
	Output = "OUT"   // a line that a tool writes
	Done   = "DONE"  // the command was carried out; a Report
	Fail   = "FAIL"  // it was not; the error
)

// PC begins the command line of kernels on PCs. On a busy host the kernel's check of
// the timer may fail, which ends in a panic.
const PC = "console=ttyS0 panic=1 quiet no_timer_check"

// EFICmdline is the command line of a kernel that the firmware starts.
const EFICmdline = PC + ` ota.loader=efi initrd=\initrd`

// Report is what the guest knows about itself.
type Report struct {
	Running   int    // slot
	Version   string // of the image that runs, from a file in it
	Active    int
	Committed bool
	Trial     bool   // the running slot is on trial
	Outcome   string // of the last trial
	Reason    string
	LastSlot  int
	Written   int64 // bytes written by the last update
	Skipped   int64
	Stored    string // version of the running slot in the boot state
	// Digests has the SHA-256 of what is in the parts of the running slot, read
	// from the disk at the command "digests".
	Digests  map[string]string `json:",omitempty"`
	Uptime   string            // seconds since the boot
	Watchdog string            `json:",omitempty"` // of the kernel: "active" or "inactive"
	Problem  string            `json:",omitempty"` // failure of the last operation
}

// ParseReport reads the report in a line of the guest.
func ParseReport(line string) (Report, error) {
	var r Report
	_, text, _ := strings.Cut(line, "{")
	err := json.Unmarshal([]byte("{"+text), &r)
	return r, err
}
