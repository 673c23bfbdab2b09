// Package efi drives UEFI firmware as a boot loader, with no loader in between:
// each slot has a boot option (Boot####) that starts an EFI program, mostly a
// kernel with EFI stub or a unified kernel image, and the variables BootOrder and
// BootNext choose one. The same is what efibootmgr edits. UEFI Specification 2.10,
// sections 3.1 and 3.3; variables in Linux: Documentation/filesystems/efivarfs.rst.
//
//	BootOrder  the options to start, the first one that can be loaded
//	BootNext   the option to start at the next boot, once
//
// A trial is BootNext: the firmware deletes it before it starts the option. A
// commit is a new BootOrder. Of the slots BootOrder names one only, the one to boot
// or to go back to: what else there is may be half an image. Options of others, in
// BootOrder too, stay as and where they are; firmware that shuffles BootOrder is
// tolerated as long as it leaves ours in it. An option of a slot that is missing is
// made, see [Slot].
//
// # What the firmware can do by itself
//
// It goes back after a panic if the kernel has panic=N on its command line, and if
// the program cannot be loaded: then it goes on with BootOrder at once. It starts no
// watchdog: a hang before any user program runs ends only when somebody resets the
// machine, unless the kernel's command line or the board arms one. A trial is
// exactly one boot.
//
// # What must be there
//
// A file system that the firmware reads, with the program of each slot under a name
// of its own, and efivarfs mounted in the running system. The command line must let
// the kernel find its root file system (root=PARTUUID=…), and should have panic=10.
// A program whose command line is built in (a unified kernel image) needs one image
// for each slot.
//
// Firmware that is reset to its defaults forgets all boot options. What it starts
// then is \EFI\BOOT\BOOTX64.EFI (BOOTAA64.EFI, …): put a copy of a slot's program or
// a rescue system there.
package efi
