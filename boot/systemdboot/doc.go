// Package systemdboot drives systemd-boot, in one of two ways.
//
// A [Counting] driver uses boot counting: a boot menu entry is a file, type 1
// (/loader/entries/NAME.conf) or a unified kernel image (/EFI/Linux/NAME.efi), and
// counters in its name say how often it may still be tried:
//
//	acme-b.conf      good
//	acme-b+2.conf    on trial, 2 boots left
//	acme-b+1-1.conf  on trial, 1 boot left, 1 done
//	acme-b+0-2.conf  bad
//
// The loader renames the file before it starts the entry, and starts the first
// entry in an order of its own: bad ones last, then by sort-key, machine-id and
// version, the newest first, then by name (systemd, src/boot/efi/boot.c;
// docs/AUTOMATIC_BOOT_ASSESSMENT.md; the Boot Loader Specification of the UAPI
// group). The driver reads what the loader reads and sorts as it sorts. So any
// version may replace any other, also an older one: where the revert slot would be
// sorted before the trial, it is named bad meanwhile, and is the first of the bad
// ones in the end. To commit is to rename, as systemd-bless-boot does.
//
// A [OneShot] driver uses the variables LoaderEntryDefault and LoaderEntryOneShot
// (systemd, docs/BOOT_LOADER_INTERFACE.md). Names stay as they are, and a trial is
// one boot.
//
// # What the loader can do by itself
//
// It goes back after a panic if the kernel has panic=N on its command line, because
// the reset that follows uses up a boot. If a kernel cannot be loaded it returns to
// the firmware, and goes back when the machine is reset; newer versions reset it by
// themselves if loader.conf says reboot-on-error. It starts no watchdog: a hang before
// any user program runs ends only when somebody resets the machine.
//
// # What must be there
//
// systemd-boot 251 or newer, and one entry for each slot, under a name that never
// changes but for the counters; the slot that comes without firmware has the name
// acme-b+0.conf. For boot counting, no entry of others may be sorted before those of
// the slots, and nothing may choose an entry by name: no line "default" in
// loader.conf, no "bootctl set-default". Type 1, for example, with both kernels on
// the EFI system partition:
//
//	title    Acme, slot B
//	sort-key acme
//	version  1
//	linux    /acme/b/vmlinuz
//	initrd   /acme/b/initrd
//	options  root=PARTUUID=… ro panic=10
//
// systemd-bless-boot.service commits an entry as soon as the system has come up; it
// must be masked if the library is to decide.
package systemdboot
