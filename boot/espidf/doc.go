// Package espidf drives the second-stage boot loader of ESP-IDF, that of the
// Espressif ESP32 family, by its otadata partition. It also reads and writes
// partition tables ([ParseTable]) and verifies application images ([VerifyImage]).
//
// # The boot state
//
// otadata has two sectors of 4096 bytes with one [Entry] each. The loader takes the
// valid entry with the larger sequence number; (seq-1) mod (number of OTA
// partitions) is the partition. If no entry is valid it starts the factory
// partition, or ota_0 if there is none (espressif/esp-idf,
// components/bootloader_support/src/bootloader_utility.c and
// bootloader_common_loader.c, include/esp_flash_partitions.h).
//
// With CONFIG_BOOTLOADER_APP_ROLLBACK_ENABLE the loader turns an entry that is NEW
// into PENDING_VERIFY before it starts the firmware, and one that is PENDING_VERIFY
// already into ABORTED, and goes back to the other entry. So a trial has one boot.
// Slots are numbered as the ota_n partitions; a factory partition comes after
// them, and should be a read-only slot: it can be gone back to, not tried.
//
// # What a power cut can do
//
// A trial is written into the sector that is not in use. The checksum of an entry
// covers its sequence number only, not its state; hence the state is written,
// synced and read back before the sequence number, and a write that was cut off
// is never an entry with another state. That takes program units of at most 16
// bytes; with flash encryption an entry is written at once, and one bit that was
// not programmed may turn NEW into VALID.
//
// A commit erases and rewrites the entry of the trial in place, as ESP-IDF does: a
// power cut there loses the entry, and the device goes back to the old firmware.
// Writing into the other sector instead would erase what the loader goes back to
// before the commit counts. Only after the commit the other sector is made to
// point to the same slot, so that nothing refers to the old one any more, and one
// bad sector does not change what boots.
//
// States that are not defined are taken for a trial that has begun, never for a
// commit; the loader starts such an entry as if it were committed.
//
// # What the loader can do by itself
//
// ESP-IDF restarts after a panic, and the interrupt and task watchdogs end most
// hangs; the loader's own watchdog (CONFIG_BOOTLOADER_WDT_ENABLE) those before
// them. Firmware that fails its checksum is passed over. For loaders without
// rollback support there is [Config.PessimisticFirstBoot].
package espidf
