// Package mongoose drives the boot loaders of Mongoose OS: MOS1 of STM32 and RS14100
// ([MOS1]), and rBoot of the ESP8266 ([RBoot]). ESP32 devices have the loader of
// ESP-IDF, see package espidf.
//
// # MOS1
//
// A [Record] of 256 bytes says which slot is active and which one to go back to.
// Records are appended to two devices, bcfg0 and bcfg1, 32 to each; a device is
// erased when the other one is full (mongoose-os-libs/bootloader,
// include/mgos_boot_cfg.h, src/mgos_boot_cfg.c). Both devices are read alike here;
// the original looks for its record in bcfg0 only. A write that was cut off ends
// the scan of a device, so the next record goes to the other one, past a sequence
// number that the torn record may still turn out to have.
//
// The loader clears FIRST_BOOT_B before it starts a firmware on trial and goes
// back when it finds neither that flag nor COMMITTED: one try. Its watchdog of 10 s
// runs until the firmware takes over. It checks the CRC of the firmware, but keeps
// trying one that is committed and fails. An image that is not linked for the
// slot it lies in is moved to another slot by the loader; what moves cannot be
// tracked, and so is refused. Sequence numbers do not wrap.
//
// # rBoot
//
// One sector holds one [RBootConfig], without a checksum unless the loader was
// built with BOOT_CONFIG_CHKSUM (cesanta/mongoose-os,
// platforms/esp8266/rboot/rboot/rboot.c). It is erased and then written, by the
// loader too. If the power fails in between, the loader starts from its built-in
// default: ROM 0, committed. So a trial of ROM 0 may become a commit, and a commit
// of ROM 1 may be lost; both hold complete firmware. Nothing can be done about
// that with this loader, which is why writing must be allowed by name
// ([RBootOptions.AllowSingle]). The magic number is written last: half a record is
// never taken for a whole one. After a rollback by the loader its marks stay, and
// the loader writes the sector at every boot; Worn is reported then, so that
// ota.Open has it cleaned.
//
// This library's records take the place of updater.dat: the commit timeout is kept
// with the boot state.
package mongoose

import (
	"errors"
	"io"

	"github.com/slotota/ota"
)

// ErrRecord says that a boot record is malformed or damaged.
var ErrRecord = errors.New("bad Mongoose OS boot record")

// readFull reads len(b) bytes at off.
func readFull(f ota.Flash, b []byte, off int64) error {
	n, err := f.ReadAt(b, off)
	if n == len(b) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return err
}
